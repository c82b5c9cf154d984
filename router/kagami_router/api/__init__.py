"""HTTP and its JSON: nothing behind this folder knows of either."""
