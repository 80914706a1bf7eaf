"""What depends on data: activations, initial factors, ranks, pruning."""
