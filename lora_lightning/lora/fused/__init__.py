"""Forward and backward passes of factorised layers that keep and compute less."""
