"""Status words: kernels report indices out of range to the host without synchronization.

In: the number of index checks of each launch. Out: one int32 word per check, which the kernel sets
and the host reads and clears::

    status = Status(device, [0, 2, 1]); status.address(1); status.take()  # 0, mostly

A word is 0 or 1, so a report between the host's read and clear is not lost: it is the same report
as the one being raised.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from turbotx.runtime.device import Device


class Status:
    """The status words of one program; thread-safe."""

    def __init__(self, device: Device, counts: Sequence[int]) -> None:
        self._firsts = [0, *accumulate(counts)]
        self._launches = [i for i, count in enumerate(counts) for _ in range(count)]
        self.words = device.new_status(max(1, len(self._launches)))
        self.seen = self.words.numpy()
        self._lock = threading.Lock()

    def address(self, launch: int) -> int:
        """Return the address of a launch's first status word; its others follow."""
        return self.words.data_ptr() + self.words.itemsize * self._firsts[launch]

    def take(self) -> int:
        """Return and clear one report: 0, or (launch + 1) << 32 | (check + 1)."""
        if not self.seen.any():
            return 0
        with self._lock:
            found = np.flatnonzero(self.seen)
            if not len(found):  # another thread took it
                return 0
            word = int(found[0])
            self.seen[word] = 0
        launch = self._launches[word]
        return (launch + 1) << 32 | (word - self._firsts[launch] + 1)
