"""The configuration: a model of it, and the way from YAML to the model."""
