"""Fewer of the kept entries read at each step."""
