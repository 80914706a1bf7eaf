"""One layer: its low-rank factors, where they start, and the module that bears them."""
