"""Somebody's own Flower App on fedkit's link: its ServerApp and ClientApp, unchanged."""
