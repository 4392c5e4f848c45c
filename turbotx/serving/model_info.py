"""Model info: what is known of a model without its weights.

In: what its files and the operator say. Out: one record, which ``/info`` shows::

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
        """Return the most padded tokens of a batch: a sparse model makes a logit a word of each."""
        if self.head.kind != "sparse":
            return limit
        return min(limit or MOST_LOGITS, max(MOST_LOGITS // self.width, 1))
