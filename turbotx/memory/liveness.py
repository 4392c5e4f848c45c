"""Liveness: computes the lifetime of every buffer from a list of launches.

In: launches in execution order, what each reads and writes, which buffers share storage. Out: the
roots that need memory and their lifetimes, half-open in launch indices::

    LaunchUse("gelu_0", reads=("ffn",), writes=("act",), inplace=(("act", "ffn"),))
    # act reuses ffn's bytes if ffn dies here, has the same size and is in the arena
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from turbotx.memory.planner.plan import Lifetime, PlanError


@dataclass(frozen=True, slots=True)
class LaunchUse:
    """What one launch accesses, by buffer name.

    `workspaces` live in this launch only. `inplace` lists pairs (written, read) for which the
    kernel is correct if both are the same bytes: elementwise or row-local, equal strides.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    workspaces: tuple[str, ...] = ()
    inplace: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Liveness:
    """Roots in order of first use, their lifetimes, and the root of every other name.

    Buffers outside the arena (inputs, outputs, parameters and what shares their storage) have no
    root here.
    """

    names: tuple[str, ...]
    lifetimes: tuple[Lifetime, ...]
    root_of: Mapping[str, str]
    reused: tuple[tuple[str, str], ...]
    """The in-place pairs (written, read) that share memory."""

    def dying_after(self, launch: int) -> tuple[str, ...]:
        """Return the roots whose last use is this launch."""
        return tuple(
            name
            for name, lifetime in zip(self.names, self.lifetimes, strict=True)
            if lifetime.end == launch + 1
        )


def analyze(
    launches: Sequence[LaunchUse],
    *,
    outside: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
    size_of: Mapping[str, Hashable] | None = None,
) -> Liveness:
    """Return the lifetimes of all buffers that need a place in the arena.

    outside: inputs, outputs and parameters.
    aliases: maps a view to what it views, in any number of steps.
    size_of: a key for each buffer; equal keys mean equal sizes at every shape. In-place reuse needs
    it for both buffers. Raises PlanError for a read before any write, for a workspace used by
    another launch, and for cyclic aliases.
    """
    storage = _Storage(aliases or {}, outside)
    first, last = _spans(launches, storage)
    reused = _reuse_in_place(launches, storage, first, last, size_of or {})
    roots = sorted(first, key=lambda root: (first[root], root))
    names = {n for u in launches for n in (*u.reads, *u.writes, *u.workspaces)}
    names |= set(aliases or {})
    root_of = {name: storage.root(name) for name in names}
    return Liveness(
        tuple(roots),
        tuple(Lifetime(first[root], last[root] + 1) for root in roots),
        {name: root for name, root in sorted(root_of.items()) if root in first},
        tuple(reused),
    )


class _Storage:
    """Union-find of names that share bytes."""

    def __init__(self, aliases: Mapping[str, str], outside: Collection[str]) -> None:
        self._parent = dict(aliases)
        for name in aliases:
            self._check_circle(name)
        self._outside = {self.root(name) for name in outside}

    def root(self, name: str) -> str:
        while name in self._parent:
            name = self._parent[name]
        return name

    def is_outside(self, root: str) -> bool:
        return root in self._outside

    def merge(self, child: str, parent: str) -> None:
        self._parent[child] = parent

    def _check_circle(self, name: str) -> None:
        seen = [name]
        while seen[-1] in self._parent:
            seen.append(self._parent[seen[-1]])
            if seen[-1] == name:
                raise PlanError(f"aliases go in a circle: {' -> '.join(seen)}")
            if len(seen) > len(self._parent) + 1:
                return  # a cycle further up, reported for one of its own names


def _spans(
    launches: Sequence[LaunchUse], storage: _Storage
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the first and the last launch that accesses each root inside the arena."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    private: dict[str, str] = {}
    for index, use in enumerate(launches):
        for name in use.reads:
            root = storage.root(name)
            if storage.is_outside(root):
                continue
            if root not in first:
                raise PlanError(
                    f"launch {use.name} reads {name}, which no earlier launch wrote; if it is an "
                    f"input or a parameter, list it as outside"
                )
            last[root] = index
        for name in (*use.writes, *use.workspaces):
            root = storage.root(name)
            if not storage.is_outside(root):
                first.setdefault(root, index)
                last[root] = index
        for name in use.workspaces:
            private.setdefault(storage.root(name), use.name)
    for root, launch_name in private.items():
        if first.get(root) != last.get(root):
            raise PlanError(f"{root} is a workspace of {launch_name}, but other launches use it")
    return first, last


def _reuse_in_place(
    launches: Sequence[LaunchUse],
    storage: _Storage,
    first: dict[str, int],
    last: dict[str, int],
    size_of: Mapping[str, Hashable],
) -> list[tuple[str, str]]:
    """Let launches write over inputs that die in them; updates storage, first and last. Returns the
    pairs."""
    taken = []
    sizes = {
        storage.root(name): size for name, size in size_of.items() if name == storage.root(name)
    }
    for index, use in enumerate(launches):
        claimed: set[str] = set()
        for written, read in use.inplace:
            child, parent = storage.root(written), storage.root(read)
            if child == parent or child not in first or parent not in first:
                continue
            born_here = first[child] == index
            dies_here = last[parent] == index
            read_once = [storage.root(name) for name in use.reads].count(parent) == 1
            same_size = child in sizes and sizes[child] == sizes.get(parent)
            if parent in claimed or not (born_here and dies_here and read_once and same_size):
                continue
            claimed.add(parent)
            storage.merge(child, parent)
            last[parent] = last.pop(child)
            del first[child]
            taken.append((written, read))
    return taken
