"""Generator: a causal language model from disk, optimized, with its tokenizer.

In: a Hugging Face directory. Out: the model that the server runs, with its description; nothing is
downloaded::

    load_generator("path/to/llama").ends      # frozenset({2})
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbotx.runtime.placement import require_device
from turbotx.serving.generation.sampling import Sampling
from turbotx.serving.model_files import DTYPES, POSITIONS, find_folder
from turbotx.serving.sentence_files import ModelFilesError, loading, refuse_missing
from turbotx.serving.tokenizer_files import LONGEST, need_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generator:
    """A causal language model with its tokenizer and settings.

    module: `model` optimized. ends: end-of-text tokens. context: most positions of a sequence.
    defaults: default sampling options, from `generation_config.json`.
    """

    model: Any
    module: Any
    tokenizer: Any
    name: str
    context: int
    vocabulary: int
    ends: frozenset[int] = frozenset()
    defaults: Sampling = field(default_factory=Sampling)
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)


def load_generator(
    model: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: Any = "none",
    max_length: int | None = None,
    max_cache_nbytes: int | None = None,
    served_model_name: str | None = None,
) -> Generator:
    """Load a causal language model from a local directory and optimize it.

    quantize: the option of ``turbotx.optimize``. max_length: most positions of a sequence, at most
    the model's. max_cache_nbytes: limit of the key/value caches. Raises ModelFilesError.
    """
    if dtype not in DTYPES:
        raise ModelFilesError(f"no dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    require_device(device)
    folder = find_folder(model)
    need_tokenizer(folder)
    with loading(str(folder)):
        plain, tokenizer = _read(folder, dtype)
    plain = plain.to(device).eval()
    # A lazy import: a process that only reads files does not need it.
    from turbotx.engine.optimize import optimize

    module = optimize(plain, max_cache_nbytes=max_cache_nbytes, quantize=quantize)
    name = served_model_name or folder.resolve().name
    shown = dtype if quantize == "none" else f"{dtype}-{quantize}"
    return make_generator(plain, module, tokenizer, name, max_length, shown, device)


def make_generator(
    model: Any, module: Any, tokenizer: Any, name: str, max_length: int | None = None,
    dtype: str = "float32", device: str = "cpu",
) -> Generator:  # fmt: skip
    """Return the generator of a loaded model. Raises ModelFilesError."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelFilesError(
            f"{type(tokenizer).__name__} is written in Python: only fast tokenizers are served"
        )
    options = model.config.get_text_config(decoder=True)
    said = (getattr(options, key, None) for key in POSITIONS)
    positions = [n for n in said if n]
    if tokenizer.model_max_length < LONGEST:
        positions.append(int(tokenizer.model_max_length))
    if not positions and max_length is None:
        raise ModelFilesError(f"{name} has no number of positions: give --max-length")
    context = min([*positions, *([] if max_length is None else [max_length])])
    generation = model.generation_config
    ends = frozenset([*_ids(generation.eos_token_id), *_ids(tokenizer.eos_token_id)])
    defaults = Sampling(
        temperature=_or(generation.temperature, 1.0),
        top_p=_or(generation.top_p, 1.0),
        top_k=_or(generation.top_k, 0) if generation.do_sample else 0,
    )
    vocabulary = int(options.vocab_size)
    return Generator(
        model, module, tokenizer, name, context, vocabulary, ends, defaults, dtype, device
    )


def _read(folder: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers

    # stderr has JSON lines only; missing weights are an error below.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelFilesError(
            f"{folder} is of type {config.model_type}, an encoder with a decoder: texts are made "
            "by causal language models"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, local_files_only=True, dtype=getattr(torch, dtype),
        output_loading_info=True,
    )  # fmt: skip
    refuse_missing(folder, report["missing_keys"])
    return model, tokenizer


def _ids(said: Any) -> Iterable[int]:
    return () if said is None else [said] if isinstance(said, int) else said


def _or(said: Any, default: Any) -> Any:
    return default if said is None else said
