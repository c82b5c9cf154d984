"""From logits to the next token, for all sequences of a step at once."""
