"""Share the CPU threads of one worker among the images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


class SideBySide:
    """Give each item of a batch threads of its own.

    An operator that several threads share ends at a barrier, where the slowest of them is waited for, and a network
    has hundreds; items that have a thread each never wait for each other.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = None
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, "image", initializer=torch.set_flush_denormal, initargs=(True,))

    def parts(self, number: int) -> list[slice]:
        """Say how so many items are cut up: into single ones; not at all for one thread, which is best in one go."""
        return [slice(number)] if self.threads == 1 else [slice(index, index + 1) for index in range(number)]

    def each(self, see: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """Return what `see` gives for each item; a single one has the calling thread, and all threads of its operators.

        Raises what the first of them raised, once all have ended.
        """
        if self._pool is None or len(items) == 1:
            return [see(item) for item in items]
        share = max(1, self.threads // len(items))

        def see_in_share(item: Item) -> Found:
            torch.set_num_threads(share)  # of the calling thread
            return see(item)

        futures = [self._pool.submit(see_in_share, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]
