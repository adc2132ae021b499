"""Fewer pairs while a prompt is read."""
