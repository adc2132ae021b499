"""Scores made into weights by something else than softmax."""
