"""Fewer tokens in an encoder's later layers."""
