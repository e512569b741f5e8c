"""Primitives over the cryptography package, and the replay window."""
