"""The engine: one driver for every strategy, the server and client processes around it."""
