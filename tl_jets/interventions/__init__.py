"""Interventions: hooks that ablate, patch and steer, and what they change."""
