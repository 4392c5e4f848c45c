"""Model info: a model's description, available without its weights.

In: the model's files and the operator's choices. Out: one record, shown by ``/info``::

    ModelInfo("all-MiniLM-L6-v2", "9a2f…", "float32", 256, 384, Head("embedding"))
"""

from __future__ import annotations

from dataclasses import dataclass, field

from turbotx.serving.engine import Head
from turbotx.serving.sentence_files import Prompts

MOST_LOGITS = 1 << 26  # of one batch: 256 MiB


@dataclass(frozen=True)
class ModelInfo:
    """The model description that ``/info`` returns."""

    name: str
    revision: str
    dtype: str
    max_length: int
    width: int
    head: Head
    device: str = "cpu"
    backend: str = "eager"
    prompts: Prompts = field(default_factory=Prompts)

    def most_tokens(self, limit: int | None) -> int | None:
        """Return the most padded tokens of a batch, at most `limit`: a sparse model computes
        vocabulary-many logits per token."""
        if self.head.kind != "sparse":
            return limit
        return min(limit or MOST_LOGITS, max(MOST_LOGITS // self.width, 1))
