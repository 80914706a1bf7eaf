"""Translation: data, models, methods and settings of the recipe."""
