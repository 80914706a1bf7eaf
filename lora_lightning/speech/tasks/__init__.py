"""Models and LightningModules for recordings."""
