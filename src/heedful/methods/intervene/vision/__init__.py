"""Interventions on what is seen in images."""
