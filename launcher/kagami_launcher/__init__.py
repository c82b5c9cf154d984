"""Prepare and watch: weights first, then one shard per device and the router."""
