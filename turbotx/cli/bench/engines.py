"""Engines: the ways to run a model that are compared, each as a function of one call's inputs.

In: a name of `ENGINES`, a loaded model. Out: what runs it; engines that cannot be had here raise,
and the reason is shown in their place::

    run = make_engine("turbotx", loaded, folder)
    run((), {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from turbotx.cli.bench.gemms_only import make_gemms_only
from turbotx.cli.models import ModelWithInputs
from turbotx.engine.optimize import optimize
from turbotx.errors import ModelError
from turbotx.saved.load import SavedModule

Run = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
ENGINES = {
    "turbotx": "turbotx.optimize(model)",
    "turbotx-packed": 'turbotx.optimize(model, padding="packed")',
    "turbotx-int8": 'turbotx.optimize(model, quantize="int8")',
    "floor-mkl": "the GEMMs over weights packed once by MKL, and attention, in the model's order",
    "floor-onednn": "the same with oneDNN",
    "eager": "the model itself",
    "onnxruntime": "ONNX Runtime, the model exported by torch.onnx.export",
    "onnxruntime-optimized": "the same after ONNX Runtime's transformer optimizer",
    "onnxruntime-int8": "that, its weights in int8 by channel, activations quantised in every call",
    "compile": "torch.compile(model), weights frozen",
    "compile-dynamic": "torch.compile(model, dynamic=True), weights frozen",
}


ASKED_FOR = ("turbotx-packed", "turbotx-int8", "onnxruntime-int8")
"""Engines that are compared only where they are named: not every model can be packed, and int8 is
another computation."""


def make_engine(name: str, loaded: ModelWithInputs, folder: Path) -> Run:
    """Return what runs the model; `folder` is for its files. Raises what the engine raises,
    and ModelError for an unknown name, or a saved file that another engine is to run."""
    model: Any = loaded.model
    if isinstance(model, SavedModule) and name != "turbotx":
        raise ModelError("a saved file holds no module: only turbotx runs it")
    if name.startswith("floor-"):
        return make_gemms_only(loaded, name.partition("-")[2])
    if name.startswith("onnxruntime"):
        return _make_onnxruntime(loaded, folder, name.partition("-")[2])
    if name == "turbotx":
        model = model if isinstance(model, SavedModule) else optimize(model, **loaded.options)
    elif name == "turbotx-packed":
        model = optimize(model, padding="packed")
    elif name == "turbotx-int8":
        model = optimize(model, quantize="int8")
    elif name.startswith("compile"):
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.freezing = True
        model = torch.compile(model, dynamic=True if name == "compile-dynamic" else None)
    elif name != "eager":
        raise ModelError(f"no engine is called {name!r}: there are {', '.join(ENGINES)}")
    return lambda args, kwargs: model(*args, **kwargs)


def _make_onnxruntime(loaded: ModelWithInputs, folder: Path, how: str) -> Run:
    """Return a session over the exported model, every tensor's first two sizes dynamic; how: "",
    "optimized", "int8"."""
    onnxruntime = importlib.import_module("onnxruntime")
    if loaded.args:
        raise ModelError("ONNX Runtime is measured on keyword inputs only")
    path = folder / "model.onnx"
    given = {k: v for k, v in loaded.kwargs.items() if isinstance(v, torch.Tensor)}
    dynamic = tuple(dict.fromkeys(range(v.dim()), torch.export.Dim.AUTO) for v in given.values())
    rest = {k: v for k, v in loaded.kwargs.items() if k not in given}
    torch.onnx.export(
        _Fixed(loaded.model, tuple(given), rest), tuple(given.values()), str(path), dynamo=True,
        input_names=list(given), dynamic_shapes=(dynamic,), optimize=True, verbose=False,
    )  # fmt: skip
    if how:
        path = _optimize(loaded.model, path)
    if how == "int8":
        tool = importlib.import_module("onnxruntime.quantization")
        narrow = path.with_name("int8.onnx")
        tool.quantize_dynamic(str(path), str(narrow), per_channel=True)
        path = narrow
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)
    wanted = [x.name for x in session.get_inputs()]

    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return session.run(None, {name: kwargs[name].numpy() for name in wanted})

    return run


class _Fixed(torch.nn.Module):
    """A model with its non-tensor arguments filled in, tensors out."""

    def __init__(self, model: Any, names: tuple[str, ...], rest: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.rest = model, names, dict(rest)
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = dict(zip(self.names, tensors, strict=True))
        leaves = torch.utils._pytree.tree_leaves(self.model(**given, **self.rest))
        return [x for x in leaves if isinstance(x, torch.Tensor)]


def _optimize(model: Any, path: Path) -> Path:
    """Fuse attention, GELU and LayerNorm as ONNX Runtime's own tool does."""
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    config = model.config
    optimized = optimizer.optimize_model(
        str(path), model_type=str(config.model_type), num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size, opt_level=1,
    )  # fmt: skip
    target = path.with_name("optimized.onnx")
    optimized.save_model_to_file(str(target), use_external_data_format=True)
    return target
