"""`text-generation-benchmark`: drives a server over HTTP and says how fast it is."""
