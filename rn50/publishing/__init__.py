"""A finished run -> a model that others can use."""
