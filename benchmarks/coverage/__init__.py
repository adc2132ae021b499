"""How much of an installed transformers our attention reaches."""
