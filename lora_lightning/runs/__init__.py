"""What recipes run; each kind of run is one module with its typed configuration beside it."""
