"""Attention without a map, its cost linear in the number of tokens."""
