"""What all generating routes share: from a request to its answer or its stream."""
