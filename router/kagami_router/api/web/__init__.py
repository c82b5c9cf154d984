"""Code around every handler: connections, middleware, errors, headers, streams, log lines."""
