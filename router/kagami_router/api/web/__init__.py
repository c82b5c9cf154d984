"""Around every handler: connections, middleware, errors, headers, streams, the log line."""
