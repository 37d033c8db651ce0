"""The server half of each algorithm, and who takes part."""
