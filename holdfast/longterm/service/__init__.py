"""A memory for others: HTTP, a page to browse it, and the Model Context Protocol."""
