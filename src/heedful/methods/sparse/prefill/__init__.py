"""Fewer pairs of tokens computed while a prompt is read."""
