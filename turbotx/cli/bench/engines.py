"""Engines: the compared ways to run a model, each as a function of one call's inputs.

In: a name of `ENGINES`, a loaded model. Out: a function that runs it. Unavailable engines raise,
and the reason is shown instead of their times::

    run = make_engine("turbotx", loaded, folder)
    run((), {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbotx.cli.bench.gemms_only import make_gemms_only
from turbotx.cli.bench.peers import PEERS, Run, compile_frozen, make_peer
from turbotx.cli.models import ModelWithInputs
from turbotx.engine.optimize import optimize
from turbotx.errors import ModelError
from turbotx.saved.load import SavedModule


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


OPTIONS: dict[str, dict[str, Any]] = {
    "turbotx-packed": {"padding": "packed"},
    "turbotx-int8": {"quantize": "int8"},
    "turbotx-packed-int8": {"padding": "packed", "quantize": "int8"},
    "turbotx-unpacked": {"pack_weights": False},
}
"""turbotx with options of `turbotx.optimize`, by the engine's name."""

ENGINES = {
    "turbotx": "turbotx.optimize(model)",
    **{name: f"turbotx.optimize(model, {_shown(given)})" for name, given in OPTIONS.items()},
    "floor-mkl": "the GEMMs over weights packed once by MKL, and attention, in the model's order",
    "floor-onednn": "the same with oneDNN",
    "floor-int8": "the same with oneDNN, of int8",
    "eager": "the model itself",
    "onnxruntime": "ONNX Runtime, the model exported by torch.onnx.export",
    "onnxruntime-optimized": "the same after ONNX Runtime's transformer optimizer",
    "onnxruntime-int8": "that, its weights in int8 by channel, activations quantised in every call",
    "openvino": "OpenVINO, converted from the model, compiled for each shape",
    "openvino-int8": "the same after nncf's post-training quantisation",
    "zentorch": 'torch.compile(model, backend="zentorch"), weights frozen',
    "ctranslate2": "CTranslate2, converted from the model",
    "ctranslate2-int8": "the same, its products in int8",
    "compile": "torch.compile(model), weights frozen",
    "compile-dynamic": "torch.compile(model, dynamic=True), weights frozen",
}


ASKED_FOR = (
    *OPTIONS, "floor-int8", "onnxruntime-int8", "openvino-int8", "zentorch", "ctranslate2",
    "ctranslate2-int8",
)  # fmt: skip
"""Engines that are compared only when named: not every model can be packed, int8 computes something
else, and the others support few models or processors."""


def make_engine(name: str, loaded: ModelWithInputs, folder: Path) -> Run:
    """Return a function that runs the model; `folder` is for its files. Raises what the engine
    raises, and ModelError for an unknown name, or for a saved file with another engine than
    turbotx."""
    model: Any = loaded.model
    if isinstance(model, SavedModule) and name != "turbotx":
        raise ModelError("a saved file holds no module: only turbotx runs it")
    if name.startswith("floor-"):
        return make_gemms_only(loaded, name.partition("-")[2])
    if name.partition("-")[0] in PEERS:
        return make_peer(name, loaded, folder)
    if name == "turbotx":
        model = model if isinstance(model, SavedModule) else optimize(model, **loaded.options)
    elif name in OPTIONS:
        model = optimize(model, **OPTIONS[name])
    elif name.startswith("compile"):
        model = compile_frozen(model, dynamic=True if name == "compile-dynamic" else None)
    elif name != "eager":
        raise ModelError(f"no engine is called {name!r}: use one of {', '.join(ENGINES)}")
    return lambda args, kwargs: model(*args, **kwargs)
