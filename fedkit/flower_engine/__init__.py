"""fedkit on Flower's own engine: the apps that SuperLink and SuperNodes run for `flwr run`."""
