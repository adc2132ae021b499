"""Diffusion models: guidance, and layouts that are asked for."""
