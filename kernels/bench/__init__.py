"""Benchmarks of the op, the model, training and the router."""
