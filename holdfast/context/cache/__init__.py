"""Caches of keys and values in a fixed number of bytes: one policy per file."""
