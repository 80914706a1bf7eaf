"""What only a CUDA device can show: `pytest -m cuda`."""
