"""Heads and weights taken out."""
