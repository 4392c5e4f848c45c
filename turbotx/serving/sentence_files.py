"""Sentence files: reads the modules, prompts and lengths of a sentence-transformers directory.

In: a directory with ``modules.json``, written by any version of sentence-transformers. Out: plain
data; unknown modules, options and modes are errors that name them::

    read_sentence_files(folder).steps     # (Pooling(width=768, modes=("cls",)), Dense(768, 256, …))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbotx.errors import TurbotxError, kind_and_line

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Before version 5.4: one flag per mode; the enabled ones are joined in this order.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
OUTPUTS = {"feature-extraction": "last_hidden_state", "sequence-classification": "logits",
           "fill-mask": "logits"}  # fmt: skip
KINDS = {"feature-extraction": "SentenceTransformer", "sequence-classification": "CrossEncoder",
         "fill-mask": "SparseEncoder"}  # fmt: skip
SPARSE_ACTIVATIONS = {"relu": 1, "log1p_relu": 2}  # how many times log1p is applied after ReLU
ARGUMENTS = {  # from_pretrained arguments that do not change results, or are passed on
    "model": {"add_pooling_layer", "attn_implementation", "dtype", "torch_dtype"},
    "tokenizer": {"model_max_length", "padding_side", "use_fast"},
    "config": {"use_cache"},
}
NEWER_NAMES = {"model": "model", "tokenizer": "processor", "config": "config"}  # …_args, …_kwargs


class ModelFilesError(TurbotxError):
    """A model directory is incomplete, unreadable, or has features that are not supported."""


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Context that converts exceptions of transformers and file readers to a ModelFilesError naming
    `what`; turbotx's own errors pass through."""
    try:
        yield
    except TurbotxError:
        raise
    except Exception as error:
        raise ModelFilesError(f"{what} cannot be loaded: {kind_and_line(error)}") from error


def refuse_missing(folder: Path, names: Iterable[str]) -> None:
    """Raise ModelFilesError if there are names of weights that a directory lacks."""
    if missing := sorted(names):
        raise ModelFilesError(
            f"{folder}: the weights lack {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}: they would be random"
        )


@dataclass(frozen=True)
class Pooling:
    """Pooling of token vectors: the modes' results, concatenated."""

    width: int
    modes: tuple[str, ...]


@dataclass(frozen=True)
class Dense:
    """A linear layer. activation: name of a class in ``torch.nn``; folder: has the weights."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm over the vector. folder: has the weights; width: the vector's."""

    folder: Path
    width: int


@dataclass(frozen=True)
class Normalize:
    """L2 normalization."""


@dataclass(frozen=True)
class Cut:
    """Truncation to the first ``width`` numbers (``truncate_dim``)."""

    width: int


@dataclass(frozen=True)
class Splade:
    """SPLADE pooling: masked-language-model logits to one weight per vocabulary entry."""

    strategy: str = "max"  # over the tokens: max or sum
    logarithms: int = 1


Step = Pooling | Dense | LayerNorm | Normalize | Cut | Splade


@dataclass(frozen=True)
class Prompts:
    """Prompts by name. default: the prompt of requests that name none."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str = ""
    pooled: bool = True  # False: exclude prompts from pooling, which is not supported


@dataclass(frozen=True)
class SentenceFiles:
    """All modules. transformer: the folder of weights, configuration and tokenizer."""

    transformer: Path
    steps: tuple[Step, ...] = ()
    prompts: Prompts = Prompts()
    max_length: int | None = None
    lower_case: bool = False


def read_sentence_files(folder: Path, task: str) -> SentenceFiles | None:
    """Read the directory; return None if it has no ``modules.json``.

    task: ``feature-extraction`` or ``sequence-classification``; becomes ``fill-mask`` if
    ``modules.json`` has a SpladePooling. Raises ModelFilesError with the name of anything unknown.
    """
    modules = read_json(folder / "modules.json", list)
    if modules is None:
        return None
    kinds = [_kind_of(module, folder) for module in modules]
    if "SpladePooling" in kinds:
        task = "fill-mask"
    if not kinds or kinds[0] not in ("Transformer", *(["MLMTransformer"] * (task == "fill-mask"))):
        raise ModelFilesError(
            f"{folder}/modules.json begins with {kinds[0] if kinds else 'nothing'}: only models "
            "that begin with sentence_transformers' Transformer are served"
        )
    transformer = folder / modules[0]["path"]
    options = _transformer_options(transformer, task)
    classifies = task == "sequence-classification"
    prompts, cut = _read_model_options(folder, KINDS[task])
    steps: list[Step] = []
    pooled = True
    for kind, module in zip(kinds[1:], modules[1:], strict=True):
        place = folder / module["path"]
        if classifies or kind not in READERS:
            raise ModelFilesError(
                f"{folder}/modules.json has the module {module['type']}, which is not served"
                f"{' with a classifier' if classifies else ''}"
            )
        found = read_json(place / "config.json", dict) or {}
        if kind == "Pooling":
            pooled = pooled and found.pop("include_prompt", True) is True
        steps.append(READERS[kind](place, found))
    if not pooled:
        prompts = Prompts(prompts.texts, prompts.default, pooled=False)
    if not pooled and prompts.default:
        raise ModelFilesError(f"{folder} leaves its default prompt out of the pooling "
                              "(include_prompt: false), which is not served")  # fmt: skip
    if cut is not None:
        steps.append(Cut(cut))
    if not classifies:
        check_widths(steps, folder)
    return SentenceFiles(transformer, tuple(steps), prompts, **options)


def check_widths(steps: list[Step], folder: Path) -> None:
    """Raise ModelFilesError if a step's input width is not the output width before it."""
    if not steps or (isinstance(steps[0], Splade) and len(steps) == 1):
        return  # a token model or a sparse model
    if not isinstance(steps[0], Pooling):
        raise ModelFilesError(
            f"{folder}/modules.json does not pool the tokens right after the Transformer: of "
            "models of one vector a token only those without further modules are served"
        )
    width = 0
    for step in steps:
        takes = {Pooling: 0, Normalize: width, Cut: width}.get(type(step))
        if takes is None:
            takes = step.in_features if isinstance(step, Dense) else step.width  # type: ignore[union-attr]
        if takes != width:
            raise ModelFilesError(
                f"{folder}: {type(step).__name__} takes vectors of {takes}, but gets {width}"
            )
        width = width_after(step, width)


def width_after(step: Step, width: int) -> int:
    """Return a step's output width, given its input width."""
    if isinstance(step, Pooling):
        return step.width * len(step.modes)
    if isinstance(step, Dense):
        return step.out_features
    return min(step.width, width) if isinstance(step, Cut) else width


def read_json(path: Path, kind: type) -> Any:
    """Return a JSON file's content, None if there is no file. Raises ModelFilesError if it is not
    JSON of the type `kind`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"cannot read {path}: {error}") from error
    if found is not None and not isinstance(found, kind):
        raise ModelFilesError(f"{path} holds a {type(found).__name__}, not a {kind.__name__}")
    return found


def _kind_of(module: Any, folder: Path) -> str:
    """Return the class name of a module; ModelFilesError if it is not sentence-transformers'
    own."""
    if not (isinstance(module, dict) and isinstance(module.get("type"), str)):
        raise ModelFilesError(f"{folder}/modules.json has an entry without a type: {module!r}")
    path = module.setdefault("path", "")
    if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ModelFilesError(f"{folder}/modules.json leads out of its directory: {path!r}")
    _known(module, {"idx", "name", "path", "type", "kwargs"}, folder / "modules.json")
    if module.get("kwargs"):
        raise ModelFilesError(
            f"{folder}/modules.json: {module['type']} takes arguments with each call, "
            f"{module['kwargs']}, which are not served"
        )
    package, _, name = module["type"].rpartition(".")
    if not f"{package}.".startswith("sentence_transformers."):
        raise ModelFilesError(
            f"{folder}/modules.json has the module {module['type']}, which is not one of "
            "sentence_transformers: code that comes with a model is not run"
        )
    return name


def _known(options: Mapping[str, Any], names: set[str], path: Path) -> None:
    unknown = sorted(set(options) - names)
    if unknown:
        raise ModelFilesError(
            f"{path} has {', '.join(unknown)}, which this server does not know: the answers could "
            "be other than the model's"
        )


def _number(options: Mapping[str, Any], name: str, path: Path) -> int:
    value = options.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelFilesError(f"{path}: {name} is {value!r}, a size is needed")
    return value


def _read_pooling(folder: Path, options: dict[str, Any]) -> Pooling:
    path = folder / "config.json"
    sizes = {"embedding_dimension", "word_embedding_dimension"}
    _known(options, {*sizes, "pooling_mode", *FLAGS}, path)
    said = options.get("pooling_mode")
    if said is None:
        modes = tuple(mode for flag, mode in FLAGS.items() if options.get(flag)) or ("mean",)
    else:
        modes = (said,) if isinstance(said, str) else tuple(said)
    for mode in modes:
        if mode not in MODES:
            raise ModelFilesError(f"{path}: cannot pool by {mode!r}: one of {', '.join(MODES)}")
    size = "embedding_dimension" if "embedding_dimension" in options else "word_embedding_dimension"
    return Pooling(_number(options, size, path), modes)


def _names_only_the_sentence(options: dict[str, Any], path: Path) -> None:
    for name in ("module_input_name", "module_output_name"):
        if options.pop(name, None) not in (None, "sentence_embedding"):
            raise ModelFilesError(f"{path}: {name} is not sentence_embedding, which is not served")


def _read_dense(folder: Path, options: dict[str, Any]) -> Dense:
    path = folder / "config.json"
    _names_only_the_sentence(options, path)
    _known(options, {"in_features", "out_features", "bias", "activation_function", "use_residual"}, path)  # fmt: skip  # noqa: E501
    activation = options.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not str(activation).startswith("torch.nn."):
        raise ModelFilesError(f"{path}: the activation {activation} is not one of torch.nn")
    return Dense(
        folder, _number(options, "in_features", path), _number(options, "out_features", path),
        bool(options.get("bias", True)), activation.rpartition(".")[2],
        bool(options.get("use_residual", False)),
    )  # fmt: skip


def _read_layer_norm(folder: Path, options: dict[str, Any]) -> LayerNorm:
    _known(options, {"dimension"}, folder / "config.json")
    return LayerNorm(folder, _number(options, "dimension", folder / "config.json"))


def _read_splade(folder: Path, options: dict[str, Any]) -> Splade:
    path = folder / "config.json"
    sizes = {"embedding_dimension", "word_embedding_dimension"}  # the vocabulary's
    _known(options, {"pooling_strategy", "activation_function", *sizes}, path)
    strategy = options.get("pooling_strategy", "max")
    activation = options.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in SPARSE_ACTIVATIONS:
        raise ModelFilesError(f"{path}: cannot pool by {strategy!r} of {activation!r}")
    return Splade(strategy, SPARSE_ACTIVATIONS[activation])


def _read_normalize(folder: Path, options: dict[str, Any]) -> Normalize:
    _names_only_the_sentence(options, folder / "config.json")
    _known(options, set(), folder / "config.json")
    return Normalize()


READERS: dict[str, Any] = {
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "LayerNorm": _read_layer_norm,
    "Normalize": _read_normalize,
    "SpladePooling": _read_splade,
}


def _transformer_options(folder: Path, task: str) -> dict[str, Any]:
    """Return ``max_length`` and ``lower_case``; options that would change results are errors."""
    for name in TRANSFORMER_FILES:
        path = folder / name
        options = read_json(path, dict)
        if options:
            break
    options = dict(options or {})
    for kind, allowed in ARGUMENTS.items():
        given = options.pop(f"{kind}_args", None) or options.pop(f"{NEWER_NAMES[kind]}_kwargs", {})
        given.pop("trust_remote_code", None)  # sentence-transformers drops it too
        _known(given, allowed, path)
        if given.get("model_max_length"):
            options["max_seq_length"] = given["model_max_length"]
    absent = ("query_length", "document_length", "query_expansion", "processing_kwargs")
    wanted: dict[str, Any] = {**dict.fromkeys(absent), "transformer_task": task}
    others = {"max_seq_length", "do_lower_case", "unpad_inputs", "modality_config"}
    _known(options, {*wanted, *others, "module_output_name"}, path)
    for name, value in wanted.items():
        if options.get(name, value) not in (value, {}):
            raise ModelFilesError(f"{path}: {name} is {options[name]!r}, which is not served")
    inputs = options.get("modality_config", {"text": {}})
    forward = {"method": "forward", "method_output_name": OUTPUTS[task]}
    if "message" in inputs or {**forward, **inputs.get("text", {"method": None})} != forward:
        raise ModelFilesError(
            f"{path}: modality_config is {inputs}: only plain texts through forward are served"
        )
    length = options.get("max_seq_length")
    return {"max_length": length, "lower_case": bool(options.get("do_lower_case", False))}


def _read_model_options(folder: Path, kind: str) -> tuple[Prompts, int | None]:
    """Return prompts and ``truncate_dim`` of ``config_sentence_transformers.json``."""
    path = folder / "config_sentence_transformers.json"
    options = read_json(path, dict) or {}
    _known(options, {"model_type", "__version__", "prompts", "default_prompt_name", "truncate_dim",
                     "similarity_fn_name", "requirements", "activation_fn"}, path)  # fmt: skip
    if options.get("model_type", kind) != kind:
        raise ModelFilesError(f"{path}: model_type is {options['model_type']}: {kind} is served")
    texts = options.get("prompts") or {}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ModelFilesError(f"{path}: prompts must be texts by name, got {texts!r}")
    name = options.get("default_prompt_name")
    if name is not None and name not in texts:
        raise ModelFilesError(f"{path}: default_prompt_name is {name!r}, prompts has no such name")
    if kind == "CrossEncoder" and any(texts.values()):
        raise ModelFilesError(f"{path}: prompts of a cross-encoder are not served")
    return Prompts(texts, texts.get(name, "")), options.get("truncate_dim")
