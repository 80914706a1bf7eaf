"""Measuring the shift between source and target."""
