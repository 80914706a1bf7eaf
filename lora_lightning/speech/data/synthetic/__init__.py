"""Spoken sentences, rooms and noises that need no download."""
