"""Where a model lies and what its folder holds."""
