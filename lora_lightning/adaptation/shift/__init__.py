"""How far apart source and target are."""
