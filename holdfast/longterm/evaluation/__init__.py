"""Conversations, worlds and scores by which policies are compared."""
