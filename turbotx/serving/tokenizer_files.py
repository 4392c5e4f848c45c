"""Tokenizer files: loads a directory's tokenizer through transformers.

In: a directory. Out: a ``TextTokenizer``. A directory without a vocabulary is an error, since every
token would be unknown::

    load_tokenizer(folder, lower_case=False).encode("hello")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbotx.serving.sentence_files import ModelFilesError, loading
from turbotx.serving.tokens import TextTokenizer

VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "spm.model", "tokenizer.model", "bpe.codes",
)  # fmt: skip
LONGEST = 10**6  # transformers uses 1e30 for an unspecified length


def load_tokenizer(folder: Path, lower_case: bool = False) -> TextTokenizer:
    """Return the tokenizer of a directory; its ``max_length`` is the files', 0 if unspecified.

    lower_case: add a lower-casing normalizer before the tokenizer's own. Raises ModelFilesError.
    """
    need_tokenizer(folder)
    with loading(f"the tokenizer of {folder}"):
        found = _read(folder)
    if lower_case:
        _lower(found.tokenizer)
    return found


def need_tokenizer(folder: Path) -> None:
    """Raise ModelFilesError for a directory without a tokenizer's file."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelFilesError(f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}")


def _read(folder: Path) -> TextTokenizer:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return TextTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), 0)
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{type(found).__name__} is written in Python: only fast ones are served")
    length = int(found.model_max_length)
    return TextTokenizer(
        backend, length if length < LONGEST else 0, pad_id=found.pad_token_id,
        gives_types="token_type_ids" in found.model_input_names,
    )  # fmt: skip


def _lower(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase, Sequence

    own = tokenizer.normalizer
    tokenizer.normalizer = Lowercase() if own is None else Sequence([Lowercase(), own])
