"""Which node holds which shard: as it says itself (``partition-id``), else the next free one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedkit.flower_engine.told import NO_SHARD


class Shards:
    """Shards by number, and the node that holds each.

    A server knows of a node that it is there before it knows its ``partition-id``: what it offers such a
    node counts only once the node has joined with it.
    """

    def __init__(self, count: int, holders: Mapping[int, int]) -> None:
        """So many shards; ``holders`` are those of a run that goes on."""
        self._count = count
        self._holder = dict(holders)
        self._offered: dict[int, int] = {}

    def holders(self) -> dict[int, int]:
        """Each shard's holder, by node id."""
        return dict(self._holder)

    def offer(self, node_id: int, present: Collection[int]) -> int:
        """The shard of a node: its own, or one that nobody holds, or else whose holder is gone."""
        here = {*present, node_id}
        known = {**self._offered, **self._holder}
        # What a node was offered counts against others once the shard's holder is gone.
        taken = {
            shard: holder
            for holders in (self._offered, self._holder)
            for shard, holder in holders.items()
            if holder in here
        }
        for holders in (self._holder, self._offered):
            for shard, holder in holders.items():
                if holder == node_id and taken[shard] == node_id:
                    return shard
        free = [shard for shard in range(self._count) if shard not in known]
        left = [shard for shard in known if shard not in taken]
        shard = min(free or left, default=NO_SHARD)
        if shard != NO_SHARD:
            self._offered[shard] = node_id
        return shard

    def take(self, shard: object, node_id: int, present: Collection[int]) -> str | None:
        """Let a node have the shard with which it joins; gives the sentence why not, or None."""
        if not isinstance(shard, int) or not 0 <= shard < self._count:
            return (
                f"There is no shard {shard!r}: this federation has {self._count} (num-shards), numbered 0 "
                f"to {self._count - 1}."
            )
        holder = self._holder.get(shard, node_id)
        if holder != node_id and holder in present:
            return (
                f"Shard {shard} is taken by another node: give every SuperNode a partition-id of its "
                "own, or none of them any."
            )
        for holders in (self._holder, self._offered):
            for mine in [number for number, holder in holders.items() if holder == node_id]:
                del holders[mine]
        self._holder[shard] = node_id
        return None
