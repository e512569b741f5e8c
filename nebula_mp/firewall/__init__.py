"""Which packets may pass, and for how long a flow stays known."""
