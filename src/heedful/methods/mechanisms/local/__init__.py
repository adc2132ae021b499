"""Mixing of nearby tokens alone."""
