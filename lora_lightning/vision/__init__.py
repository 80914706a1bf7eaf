"""Images: data, tasks, methods and settings of the recipes."""
