"""A Nebula gateway for multi-core Linux machines."""

__version__ = "0.1.0"
