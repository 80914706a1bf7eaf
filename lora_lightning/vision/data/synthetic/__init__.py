"""Rendered images that need no download."""
