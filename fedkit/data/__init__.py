"""Data sets, how they are cut into public, test and private parts, and dealt into shards."""
