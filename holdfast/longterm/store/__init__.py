"""Where memories lie: one schema in SQLite and PostgreSQL, and all that reads or writes it."""
