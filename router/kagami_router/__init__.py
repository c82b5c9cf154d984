"""HTTP in, batches out: validates, schedules and streams. No torch in this process."""
