"""A request after validation: its values, and the ids of its sequences."""
