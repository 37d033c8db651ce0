"""The gRPC link: Flower messages pushed over one held stream per client."""

import os

# gRPC's core writes lines of its own to stderr; what matters of them we say in a sentence.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
