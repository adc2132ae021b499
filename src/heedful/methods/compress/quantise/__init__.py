"""Weights, keys or values in fewer bits."""
