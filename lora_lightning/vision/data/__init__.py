"""Images from folders, by domain."""
