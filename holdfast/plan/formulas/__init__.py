"""Byte and time formulas of published systems, in integers and plain numbers."""
