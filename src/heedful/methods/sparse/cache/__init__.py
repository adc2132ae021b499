"""Fewer or smaller entries kept in the cache."""
