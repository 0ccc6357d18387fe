"""Attention functions and modules: what a layer keeps of the past, in what form."""
