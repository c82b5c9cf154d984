"""The step stream without grpcio: one gRPC call on the event loop's own thread (notes/0010)."""
