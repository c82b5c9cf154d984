"""What computes a step: one room for each way, and the choice among them."""
