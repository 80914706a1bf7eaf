"""Data for the recipes; each module imports what it needs only when it is used."""
