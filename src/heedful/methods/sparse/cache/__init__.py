"""Fewer entries in the cache."""
