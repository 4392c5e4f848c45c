"""Known sizes: checks that every size in a graph follows from its inputs' shapes.

In: a rewritten graph and the dims of its inputs. Out: nothing, or a CaptureError for the first call
whose size depends on values, for example::

    nonzero (net.py:12) has a size that depends on values, not on shapes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from turbotx.capture.trace_errors import BREAKS
from turbotx.errors import CaptureError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import spell_out


def require_known_sizes(graph: fx.Graph, dims: Sequence[str], name: str) -> None:
    """Raise CaptureError if a size, or a number computed from sizes, depends on more than the
    `dims`.

    Anything that uses such a size comes after the call that produces it, which is the one named.
    """
    known = set(dims)
    for node in graph.nodes:
        sizes: tuple[Any, ...] = ()
        if g.is_tensor(node):
            sizes = g.shape(node)
        elif g.is_size(node):
            sizes = (g.size(node),)
        if any(s.name not in known for e in sizes for s in spell_out(e).free_symbols):
            place = g.place_of(node)
            raise CaptureError(
                f"cannot capture {name}: {node.name}{f' ({place})' if place else ''} has a size or "
                f"a number that depends on values, not on shapes\n  {node.format_node()}\n"
                "  Every size is needed before anything runs: compute it outside of the optimized "
                f"module and pass it as a size, or use a mask of full size; {BREAKS}"
            )
