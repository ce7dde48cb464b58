"""Backends: what runs a plan. `reference` is the truth, `torch` runs everywhere."""
