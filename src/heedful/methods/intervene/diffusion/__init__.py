"""Interventions on diffusion models."""
