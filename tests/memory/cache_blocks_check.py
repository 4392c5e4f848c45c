"""Check of cache blocks: recounts references from the tables that name blocks.

In: blocks, and all block tables. Out: nothing, or VerifyError::

    check_blocks(blocks, [table, ...])   # "block 4 has 2 references, and 3 tables' cells name it"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from turbotx.errors import VerifyError
from turbotx.memory.cache_blocks import CacheBlocks, Ids


def check_blocks(blocks: CacheBlocks, tables: Iterable[Ids]) -> None:
    """Raise VerifyError unless every block's reference count equals the number of cells naming it.

    tables: of any shape; a negative cell names no block.
    """
    named = Counter(int(i) for table in tables for i in table.ravel() if i >= 0)
    for block in range(max([len(blocks.references), *(i + 1 for i in named)])):
        known = int(blocks.references[block]) if block < len(blocks.references) else 0
        if known != named[block]:
            raise VerifyError(
                f"block {block} has {known} references, and {named[block]} tables' cells name it"
            )
