"""Edits of the scores."""
