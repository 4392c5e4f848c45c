"""Peers: other runtimes at their best settings, each as a function of one call's inputs.

In: a runtime's name, a loaded model, a folder for its files. Out: a function that runs it. A peer
whose results differ from the model's is rejected with the difference, since its times would be
meaningless::

    run = make_peer("openvino", loaded, folder)
    run((), {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves

from turbotx.cli.models import ModelWithInputs
from turbotx.errors import ModelError

Run = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]

CALIBRATION = 32
"""Minimum number of texts for nncf's statistics: those of the example, then permutations of
them."""

ALLOWED = {"int8": 0.25, "bfloat16": 0.06, "float32": 2e-3}
"""Allowed relative RMS difference between a peer's first output and the model's: it detects a peer
that computes something else, not one that rounds differently."""


def make_peer(name: str, loaded: ModelWithInputs, folder: Path) -> Run:
    """Return a function that runs a model by a peer; the name may end in a variant:
    `openvino-int8`.

    Raises ModelError if the peer does not support the model or gives different results, and what
    the peer raises.
    """
    peer, _, how = name.partition("-")
    run = PEERS[peer](loaded, folder, how)
    check_answer(name, run, loaded)
    return run


def check_answer(name: str, run: Run, loaded: ModelWithInputs) -> None:
    """Raise ModelError if the first floating-point output differs from the model's. Padded
    positions are ignored: they are unused, and some runtimes omit them."""
    with torch.no_grad():
        wanted = _first_float(loaded.model(*loaded.args, **loaded.kwargs))
        found = _first_float(run(loaded.args, loaded.kwargs))
    if found.shape != wanted.shape:
        raise ModelError(f"{name} answers {tuple(found.shape)}, the model {tuple(wanted.shape)}")
    mask = loaded.kwargs.get("attention_mask")
    if mask is not None and mask.shape == wanted.shape[:2]:
        found, wanted = found[mask != 0], wanted[mask != 0]
    far = float((found - wanted).norm() / wanted.norm().clamp_min(1e-20))
    narrow = "bfloat16" if _is_narrow(loaded.model) else "float32"
    allowed = ALLOWED["int8" if name.endswith("int8") else narrow]
    if not far <= allowed:
        raise ModelError(
            f"{name} gives other results than the model here: {far:.2g} of its size (root mean "
            f"square) where {allowed} is allowed: not measured"
        )


def _first_float(answer: Any) -> torch.Tensor:
    leaves = (torch.as_tensor(x) for x in tree_leaves(answer) if hasattr(x, "dtype"))
    return next(x for x in leaves if x.is_floating_point()).double()


def _is_narrow(model: Any) -> bool:
    return next((p.dtype for p in model.parameters()), torch.float32) is not torch.float32


def _tensors(loaded: ModelWithInputs, peer: str) -> dict[str, torch.Tensor]:
    if loaded.args:
        raise ModelError(f"{peer} is measured on keyword inputs only")
    return {k: v for k, v in loaded.kwargs.items() if isinstance(v, torch.Tensor)}


class _Fixed(torch.nn.Module):
    """A model with its non-tensor arguments bound, returning a list of tensors."""

    def __init__(self, model: Any, names: tuple[str, ...], rest: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.rest = model, names, dict(rest)
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = dict(zip(self.names, tensors, strict=True))
        leaves = tree_leaves(self.model(**given, **self.rest))
        return [x for x in leaves if isinstance(x, torch.Tensor)]


def _fix(model: Any, loaded: ModelWithInputs, names: Sequence[str]) -> _Fixed:
    rest = {k: v for k, v in loaded.kwargs.items() if k not in names}
    return _Fixed(model, tuple(names), rest)


def _make_onnxruntime(loaded: ModelWithInputs, folder: Path, how: str) -> Run:
    """Return a session over the exported model, with the first two sizes of every tensor dynamic;
    how: "", "optimized", "int8"."""
    onnxruntime = importlib.import_module("onnxruntime")
    given = _tensors(loaded, "ONNX Runtime")
    path = folder / "model.onnx"
    dynamic = tuple(dict.fromkeys(range(v.dim()), torch.export.Dim.AUTO) for v in given.values())
    torch.onnx.export(
        _fix(loaded.model, loaded, tuple(given)), tuple(given.values()), str(path), dynamo=True,
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


def _optimize(model: Any, path: Path) -> Path:
    """Fuse attention, GELU and LayerNorm with ONNX Runtime's own tool."""
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    config = model.config
    optimized = optimizer.optimize_model(
        str(path), model_type=str(config.model_type), num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size, opt_level=1,
    )  # fmt: skip
    target = path.with_name("optimized.onnx")
    optimized.save_model_to_file(str(target), use_external_data_format=True)
    return target


def _make_openvino(loaded: ModelWithInputs, folder: Path, how: str) -> Run:
    """Return the model converted from PyTorch and compiled for each shape at which it is called,
    which is faster than dynamic shapes; how: "", "int8" by nncf.

    A bfloat16 model is converted in float32, as OpenVINO's guide recommends, and run in bfloat16 by
    a hint; outputs are float32.
    """
    openvino = importlib.import_module("openvino")
    given = _tensors(loaded, "OpenVINO")
    narrow = _is_narrow(loaded.model)
    model = copy.deepcopy(loaded.model).float() if narrow else loaded.model
    names = tuple(given)
    fixed = _fix(model, loaded, names)
    converted = openvino.convert_model(fixed, example_input=tuple(given.values()))
    if how == "int8":
        converted = _calibrate(converted, given)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
    }
    requests: dict[tuple[Any, ...], Any] = {}

    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        arrays = [kwargs[name].numpy() for name in names]
        shapes = tuple(x.shape for x in arrays)
        if shapes not in requests:
            fitted = converted.clone()
            fitted.reshape({k: list(shape) for k, shape in enumerate(shapes)})
            compiled = openvino.Core().compile_model(fitted, "CPU", settings)
            requests[shapes] = compiled.create_infer_request()
        found = requests[shapes].infer(arrays, share_inputs=True, share_outputs=True)
        return list(found.values())

    return run


def _calibrate(converted: Any, given: Mapping[str, torch.Tensor]) -> Any:
    """Return nncf's int8 model, with activation ranges calibrated on calls."""
    nncf = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    rows = len(given["input_ids"])
    draw = torch.Generator().manual_seed(0)
    calls = []
    for k in range(max(rows, CALIBRATION)):
        row = {name: x[k % rows :][:1] for name, x in given.items()}
        if k >= rows:
            ids = row["input_ids"]
            row["input_ids"] = ids[:, torch.randperm(ids.shape[1], generator=draw)]
        calls.append([x.numpy() for x in row.values()])
    return nncf.quantize(
        converted, nncf.Dataset(calls), model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calls),
    )  # fmt: skip


def _make_zentorch(loaded: ModelWithInputs, folder: Path, how: str) -> Run:
    """Return torch.compile with AMD's backend and frozen weights."""
    importlib.import_module("zentorch")
    model = compile_frozen(loaded.model, backend="zentorch")
    return lambda args, kwargs: model(*args, **kwargs)


def compile_frozen(model: Any, **options: Any) -> Any:
    """Return torch.compile's model with weights frozen as constants, for the whole process."""
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.freezing = True
    return torch.compile(model, **options)


def _make_ctranslate2(loaded: ModelWithInputs, folder: Path, how: str) -> Run:
    """Return a converted encoder of token ids and a prefix mask; how: "", "int8"."""
    ctranslate2 = importlib.import_module("ctranslate2")
    given = _tensors(loaded, "CTranslate2")
    known = {"input_ids", "attention_mask", "token_type_ids"}
    if set(given) - known:
        raise ModelError(f"CTranslate2 takes {', '.join(sorted(known))}, not {sorted(given)}")
    path = convert_to_ctranslate2(loaded.model, folder)
    narrow = "bfloat16" if _is_narrow(loaded.model) else "float32"
    encoder = ctranslate2.Encoder(
        path, device="cpu", intra_threads=torch.get_num_threads(), inter_threads=1,
        compute_type=f"int8_{narrow}" if how == "int8" else narrow,
    )  # fmt: skip
    view = ctranslate2.StorageView

    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        lengths = kwargs["attention_mask"].sum(1).int().numpy()
        ids = kwargs["input_ids"].int().numpy()
        kinds = kwargs.get("token_type_ids")
        found = encoder.forward_batch(
            view.from_array(ids), view.from_array(lengths),
            None if kinds is None else kinds.tolist(),
        )  # fmt: skip
        return [numpy.array(found.last_hidden_state.to(ctranslate2.DataType.float32))]

    return run


def convert_to_ctranslate2(model: Any, folder: Path) -> str:
    """Write a transformers model in CTranslate2's format, without a tokenizer; return its path.

    Raises ModelError if CTranslate2 does not support the model.
    """
    tool: Any = importlib.import_module("ctranslate2.converters")
    model = copy.deepcopy(model).float()
    # Their converter needs attributes that transformers 5 no longer has.
    model.config.position_embedding_type = "absolute"
    model.config.save_pretrained(folder)
    words = {f"<{k}>": k for k in range(model.config.vocab_size)}

    class Converter(tool.TransformersConverter):
        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(
                get_vocab=lambda: words, unk_token="<0>", bos_token="<0>", eos_token="<0>"
            )

    try:
        return str(Converter(str(folder)).convert(str(folder / "ctranslate2")))
    except (ValueError, AttributeError, AssertionError) as error:
        raise ModelError(f"CTranslate2 does not convert it: {error}") from error


PEERS = {
    "onnxruntime": _make_onnxruntime,
    "openvino": _make_openvino,
    "zentorch": _make_zentorch,
    "ctranslate2": _make_ctranslate2,
}
