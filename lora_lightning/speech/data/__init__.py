"""Recordings, manifests and batches."""
