"""LightningModules that recipes need; each module imports what it needs only when it is used."""
