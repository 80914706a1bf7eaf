"""Adaptation to an unlabelled target: pseudo-labels, objectives, validators, the guard."""
