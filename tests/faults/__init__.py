"""Federations of real processes that are killed, stopped, cut off and starved, and what comes of it."""
