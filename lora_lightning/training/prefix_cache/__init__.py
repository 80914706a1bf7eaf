"""The frozen first part of a network, run once for every item."""
