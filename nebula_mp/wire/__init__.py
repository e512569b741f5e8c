"""The bytes on the wire and on the TUN device: parse and encode, nothing else."""
