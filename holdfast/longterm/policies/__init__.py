"""Policies of long-term memory, one published system per file."""
