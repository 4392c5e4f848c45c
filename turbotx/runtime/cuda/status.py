"""Status words: what kernels report of indices out of range, to a host that does not wait.

In: how many index checks each launch makes. Out: one word for each check, which its kernel writes
to and the host reads and clears::

    status = Status(device, [0, 2, 1]); status.address(1); status.take()  # 0, mostly

A word has one value besides zero. So nothing is lost between the host's reading and clearing it:
a report that comes then says what is just being raised, of a call that was made before.
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
        """Return the address of a launch's first check; those of its others follow."""
        return self.words.data_ptr() + self.words.itemsize * self._firsts[launch]

    def take(self) -> int:
        """Return and forget one report that has come by now: 0, or launch + 1 and check."""
        if not self.seen.any():
            return 0
        with self._lock:
            found = np.flatnonzero(self.seen)
            if not len(found):  # another thread has taken it
                return 0
            word = int(found[0])
            self.seen[word] = 0
        launch = self._launches[word]
        return (launch + 1) << 32 | (word - self._firsts[launch] + 1)
