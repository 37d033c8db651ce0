"""A quickstart."""
