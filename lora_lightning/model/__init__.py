"""A whole network: what is adapted, put on, switched, merged, combined, saved and verified."""
