"""The contract between Kagami's processes: the wire, the errors, the log line."""
