"""A state of fixed size, carried from token to token."""
