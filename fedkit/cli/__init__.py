"""The command line: what was typed becomes settings, and an engine runs them."""
