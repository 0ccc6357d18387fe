"""The room `weights`: parameters in less memory."""
