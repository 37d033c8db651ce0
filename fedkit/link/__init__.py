"""The gRPC link: Flower messages pushed over one held stream per client."""
