"""Federations without a network: clients in worker processes that share arrays."""
