"""Selectors: who takes part in a round, a file each."""
