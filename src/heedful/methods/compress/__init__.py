"""A model's own weights, taken out or made smaller."""
