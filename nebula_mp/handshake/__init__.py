"""Nebula handshakes: one exchange, and when to repeat it."""
