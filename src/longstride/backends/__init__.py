"""Backends: what runs a plan.

`reference` is the truth; `torch` runs everywhere; `triton`, `vendor` and `flex` are for CUDA devices.
"""
