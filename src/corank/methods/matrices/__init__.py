"""Methods on plain matrices."""
