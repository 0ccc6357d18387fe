"""Less data: fewer examples, or shorter ones."""
