"""A trained model led to do something else, by hand or by a small fit."""
