"""An older app."""
