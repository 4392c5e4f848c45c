"""Routing: which replica gets a request, by its length.

In: a length in tokens. Out: the replicas in order of preference. Similar lengths go to one replica,
which reduces padding, unless that replica has clearly more outstanding work::

    homes = LengthRouting(); homes.rank(["a", "b"], length=7)      # ["a", "b"]
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Hashable, Sequence
from typing import TypeVar

Replica = TypeVar("Replica", bound=Hashable)


class LengthRouting:
    """Each replica is the home of an equal share of the recent lengths, in ascending order.

    A request goes to the replica with the least outstanding tokens, where each step away from its
    home counts as ``stickiness`` requests of average length. It has no clock.
    """

    def __init__(self, stickiness: float = 4.0, window: int = 512) -> None:
        self.stickiness = stickiness
        self._recent: deque[int] = deque(maxlen=window)
        self.sorted_lengths: list[int] = []
        self._outstanding: dict[Hashable, int] = {}
        self._sent: dict[Hashable, tuple[Hashable, int]] = {}

    def rank(self, replicas: Sequence[Replica], length: int) -> list[Replica]:
        """Return the replicas in order of preference, without recording the request."""
        self._learn(length)
        first = bisect.bisect_left(self.sorted_lengths, length)
        last = bisect.bisect_right(self.sorted_lengths, length)
        home = (first + last) / 2 / len(self.sorted_lengths) * len(replicas) - 0.5
        step = self.stickiness * sum(self.sorted_lengths) / len(self.sorted_lengths)

        def work(place: int) -> float:
            away = max(abs(place - home) - 0.5, 0.0)
            return self.outstanding(replicas[place]) + away * step

        return [replicas[place] for place in sorted(range(len(replicas)), key=work)]

    def sent(self, replica: Hashable, request: Hashable, length: int) -> None:
        """Record a request sent to a replica."""
        self._sent[request] = (replica, length)
        self._outstanding[replica] = self.outstanding(replica) + length

    def done(self, request: Hashable) -> None:
        """Record that a request was answered or failed; unknown requests are ignored."""
        replica, length = self._sent.pop(request, (None, 0))
        if replica in self._outstanding:
            self._outstanding[replica] -= length

    def outstanding(self, replica: Hashable) -> int:
        """Return the tokens sent to a replica and not yet answered."""
        return self._outstanding.get(replica, 0)

    def forget(self, replica: Hashable) -> None:
        """Remove a dead replica and its outstanding requests."""
        self._outstanding.pop(replica, None)
        self._sent = {k: v for k, v in self._sent.items() if v[0] != replica}

    def _learn(self, length: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            del self.sorted_lengths[bisect.bisect_left(self.sorted_lengths, self._recent[0])]
        self._recent.append(length)
        bisect.insort(self.sorted_lengths, length)
