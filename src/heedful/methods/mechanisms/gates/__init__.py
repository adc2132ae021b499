"""Gates on what heads hand over."""
