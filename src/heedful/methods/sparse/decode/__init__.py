"""Fewer entries read at each step."""
