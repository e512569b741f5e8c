"""The Noise IX handshake; knows nothing of Nebula."""
