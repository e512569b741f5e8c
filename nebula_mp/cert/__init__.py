"""Nebula certificates: both encodings, issuing, trust."""
