"""What runs a recipe: its YAML, its trainer, its progress."""
