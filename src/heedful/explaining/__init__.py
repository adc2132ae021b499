"""Verbs that explain what a model says of one text, and measure how far an explanation can be trusted."""
