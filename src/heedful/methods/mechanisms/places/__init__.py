"""Tokens mixed by weights of places or frequencies, without queries and keys."""
