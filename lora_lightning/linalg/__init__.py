"""Decompositions: tensors in, tensors out."""
