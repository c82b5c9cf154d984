"""What a forward pass reads: the batch and the KV cache."""
