"""Training spread over ranks: the same step, its bytes moved elsewhere in space or time."""
