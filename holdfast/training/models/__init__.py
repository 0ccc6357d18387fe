"""Models of which the memory of training is the point."""
