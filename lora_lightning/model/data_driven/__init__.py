"""What looks at data before training: activations, first factors, ranks."""
