"""Heads, tokens or experts that each token chooses."""
