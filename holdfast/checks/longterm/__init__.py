"""Checks of the long-term memory room."""
