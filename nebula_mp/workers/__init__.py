"""Thin shells that make system calls and drive the core."""
