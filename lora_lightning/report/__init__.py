"""Results in; tables, files, plots and a page out. Knows no model."""
