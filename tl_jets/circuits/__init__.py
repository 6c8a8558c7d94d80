"""Circuits: what edges carry from clean to corrupted prompts, measured and estimated."""
