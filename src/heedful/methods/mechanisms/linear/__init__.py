"""Attention without a map, linear in the number of tokens."""
