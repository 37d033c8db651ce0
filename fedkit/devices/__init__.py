"""Emulated devices: what a kind is like (``profiles``), and what one of them does when (``device``)."""
