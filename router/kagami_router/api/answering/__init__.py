"""What all generating routes share: request in, answer or stream out."""
