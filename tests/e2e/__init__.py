"""Real processes in network namespaces, with released Nebula versions at the other end."""
