"""Neural networks by name, adapted to the data's shape."""
