"""Partitions: how private samples are dealt into shards. ``dealing`` has the contract that all keep."""

from fedkit.data.partitions.dealing import Dealt, Indices, Labelled, deal, digest

__all__ = ["Dealt", "Indices", "Labelled", "deal", "digest"]
