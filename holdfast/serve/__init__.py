"""The server: an OpenAI-compatible API over a model, within one budget of key-value bytes."""
