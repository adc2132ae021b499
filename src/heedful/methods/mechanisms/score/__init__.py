"""Scores of queries and keys made in another way, or mixed."""
