"""What a model may do by itself, within limits: calls, functions, SQL and small programs."""
