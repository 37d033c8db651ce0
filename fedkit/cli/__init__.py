"""The command line: what was typed becomes settings, and an engine runs them."""

import os

# gRPC's core writes lines of its own to stderr, unless it is told not to before it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
