"""Work of the server's that takes long and falls into parts: done side by side in processes of its own.

Threads would share torch's random numbers and Python's lock; a result must not hang on who ran beside.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fedkit.errors import FedkitError

Job = TypeVar("Job")
Done = TypeVar("Done")


class Workers:
    """A pool that starts with the first work that is worth it, and lives until ``close``."""

    def __init__(self, count: int, threads: int) -> None:
        """A pool of ``count`` processes (0: one for each core) with ``threads`` of torch's each."""
        self._count = count or os.cpu_count() or 1
        self._threads = threads
        self._pool: ProcessPoolExecutor | None = None

    def map(self, work: Callable[[Job], Done], jobs: Sequence[Job]) -> list[Done]:
        """``work`` of each job, in their order; a single job or worker stays in this process.

        Args:
            work: a module's function: it travels to the workers by name.
            jobs: what it is called with.

        Raises:
            FedkitError: a worker died, most likely for want of memory.
        """
        if len(jobs) < 2 or self._count < 2:
            return [work(job) for job in jobs]
        if self._pool is None:
            # Forking a process that has threads (the link's) is not safe.
            self._pool = ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._threads,),
            )
        try:
            return list(self._pool.map(work, jobs))
        except BrokenProcessPool as error:
            self.close()
            raise FedkitError(
                "A worker process of the server died, most likely for want of memory: "
                "-o workers=1 does the work in the server itself."
            ) from error

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _start(threads: int) -> None:
    from fedkit.models.device import compute_with

    compute_with(threads)
    end_with_parent()


def end_with_parent() -> None:
    """In a process that multiprocessing started: end when the one that started it is gone.

    One that is killed must not leave workers behind.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
