"""Fewer tokens in a prompt."""
