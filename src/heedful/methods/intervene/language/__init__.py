"""Interventions on language models."""
