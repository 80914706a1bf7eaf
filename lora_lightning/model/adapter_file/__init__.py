"""Adapter files: their format, saving and loading."""
