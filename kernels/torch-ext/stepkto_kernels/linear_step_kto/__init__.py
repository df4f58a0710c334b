"""LM head and Step-KTO objective in one call. See README.md."""
