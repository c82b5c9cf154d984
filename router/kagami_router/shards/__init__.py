"""The shards as the router sees them: the step stream without grpcio, and the unary calls."""
