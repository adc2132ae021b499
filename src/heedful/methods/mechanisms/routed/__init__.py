"""Each token chooses the heads, keys or experts that serve it."""
