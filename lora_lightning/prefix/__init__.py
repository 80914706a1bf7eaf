"""`PrefixCache`: what lies before the first trained layer is computed once."""
