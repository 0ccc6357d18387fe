"""Holdfast: say what fits a memory budget, run it within the budget, prove it by measurement."""

__version__ = "0.1.0"
