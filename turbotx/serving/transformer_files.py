"""Transformer files: loads weights and configuration into the module that is optimized and run.

In: the transformer's folder and the steps after it. Out: a ``nn.Module`` from ids and mask to
(batch, width), with use_cache off; loading errors are ModelFilesErrors::

    load_module(files, Head("embedding"), "float32", None)     # SentenceModel(...)
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotx.saved.weight_files import load_weights
from turbotx.serving.engine import Head
from turbotx.serving.sentence_files import (
    ModelFilesError,
    Normalize,
    SentenceFiles,
    Splade,
    loading,
    refuse_missing,
)
from turbotx.serving.tokens import TextTokenizer

log = logging.getLogger(__name__)
ENCODERS = {  # encoder classes of encoder-decoder models
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}


@dataclass(frozen=True)
class LoadedModule:
    """A module, its padding id, and whether it takes segment ids."""

    module: Any
    pad_id: int
    takes_types: bool


def load_module(
    files: SentenceFiles, head: Head, tokenizer: TextTokenizer, dtype: str, weights: Path | None
) -> LoadedModule:
    """Load the transformer and append the steps. Raises ModelFilesError, WeightsError."""
    import torch

    from turbotx.serving import sentence_modules as modules

    wanted = getattr(torch, dtype)
    transformer = _load_transformer(
        files.transformer, head.kind, wanted if weights is None else torch.float32
    )
    if weights is not None:
        load_weights(transformer, weights)
    options = transformer.config.get_text_config()
    module: Any
    if head.kind == "classifier":
        # Without a pad token, transformers runs a decoder's head on one row at a time.
        alone = options.pad_token_id is None and hasattr(transformer, "score")
        module = (modules.LastTokenClassifier if alone else modules.ClassifierModel)(transformer)
    elif head.kind == "tokens":
        module = modules.TokenModel(transformer)
    elif isinstance(files.steps[0], Splade):
        module = modules.SpladeModel(transformer, files.steps[0])
    else:
        # The server normalizes at the end: requests may switch it off.
        steps = files.steps[:-1] if isinstance(files.steps[-1], Normalize) else files.steps
        module = modules.SentenceModel(transformer, steps)
    takes = inspect.signature(transformer.forward).parameters
    return LoadedModule(
        module.to(wanted).eval(),
        next((i for i in (options.pad_token_id, tokenizer.pad_id) if i is not None), 0),
        tokenizer.gives_types and "token_type_ids" in takes
        and (getattr(options, "type_vocab_size", 0) or 0) > 1,
    )  # fmt: skip


def _load_transformer(folder: Path, kind: str, dtype: Any) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # stderr has JSON lines only
    with loading(str(folder)):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if getattr(config, "auto_map", None):
            log.warning(
                "%s names code of its own, which is not run: transformers' own %s is",
                folder, config.model_type,
            )  # fmt: skip
        _turn_cache_off(config)
        module, report = _loader_of(config, kind, folder).from_pretrained(
            folder, config=config, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    # The model's pooler is unused: the chain pools the hidden states.
    headed = kind in ("classifier", "sparse")
    missing = report["missing_keys"]
    refuse_missing(folder, (n for n in missing if headed or not n.startswith("pooler.")))
    return module


def _turn_cache_off(config: Any) -> None:
    """Disable the key/value cache in all parts of the configuration."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _turn_cache_off(getattr(config, name))


def _loader_of(config: Any, kind: str, folder: Path) -> Any:
    import transformers

    if kind == "classifier":
        return transformers.AutoModelForSequenceClassification
    if kind == "sparse":
        return transformers.AutoModelForMaskedLM
    if config.model_type in ENCODERS:
        return getattr(transformers, ENCODERS[config.model_type])
    if getattr(config, "is_encoder_decoder", False):
        raise ModelFilesError(
            f"{folder} is of type {config.model_type}, an encoder with a decoder: of those only "
            f"{', '.join(ENCODERS)} are served"
        )
    return transformers.AutoModel
