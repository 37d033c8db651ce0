"""The edge half of each algorithm: what a device does with an instruction."""
