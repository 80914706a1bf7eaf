"""What runs a recipe: its YAML, the one runner, the methods that every kind has, its trainer."""
