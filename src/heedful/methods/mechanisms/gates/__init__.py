"""Gates on heads, or on what they hand over."""
