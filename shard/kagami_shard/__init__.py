"""One GPU or the CPU: weights, KV cache, forward pass, sampling. Never decides who runs."""
