"""Parallel text that needs no download."""
