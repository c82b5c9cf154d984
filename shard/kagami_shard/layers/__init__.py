"""What every model is made of: plain objects that hold tensors, over flat `[num_tokens, ...]`."""
