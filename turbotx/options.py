"""The options of `turbotx.optimize`, checked when they are given.

In: keyword arguments of the decorator. Out: one frozen `Options`, which is also part of the
cache key of everything built under it, for example::

    Options(backend="auto", attention="flash", planner="symbolic", pack_weights=True)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from turbotx.errors import OptionsError

HEAD = "@head"
"""In `keep_float`: the products whose result the call returns as it is, such as logits."""
_TAG = re.compile(r"cublas|([rcmnqkwsxlpo]\d+)+")


@dataclass(frozen=True)
class Options:
    """How a model is compiled.

    backend: which kernels run. "cpp" builds generated C++ and fails without a compiler; "triton"
        launches generated Triton kernels and fails unless the tensors are on an NVIDIA GPU; "aten"
        runs every region through PyTorch's own ops, in planned memory; "auto" is "triton" on a GPU,
        and on a CPU "cpp" where a compiler is found and otherwise "aten", with one warning.
    attention: how softmax(q k^T) v is computed. "flash" is one kernel that never stores the scores;
        "fused-softmax" is a batched GEMM, one scale + mask + softmax kernel and a batched GEMM;
        "auto" takes flash where its kernel can compute it (q, k and v of one head_dim of at most
        256), fused-softmax elsewhere, and leaves what neither computes to PyTorch (float64, say),
        which the named ones refuse with an OptionsError at the first call.
    planner: which memory planner assigns offsets.
    pack_weights: keep GEMM weights in the library's packed layout beside the module's own (about
        one more copy of the GEMM weights, much faster for few tokens). Updates of a weight are
        noticed at the next call, and it is packed again. False runs GEMMs through PyTorch.
    keep_weights: on a CPU, keep the parameters that were packed as they are too. False gives their
        memory back after the first call: a module's parameter is then a `PackedParameter`, which is
        unpacked where it is read, as by `state_dict`, and whose changes raise WeightsReleasedError
        (docs/scale.md). Of a quantised weight it is integers times scales, with a warning.
    epilogues: let a GEMM's launch finish its sums (bias, activation, gate, residual) where a region
        is just that; False gives every region a kernel of its own.
    gemms: on a GPU, what runs matrix products: "cublas", with a kernel for what follows; "triton",
        generated kernels that also do what follows; "auto" takes for each range of token counts
        what `turbotx tune` has measured on this device, or else what the heuristics expect to win.
    norms: on a GPU, what becomes of a LayerNorm or RMSNorm between GEMMs: "store" computes it in a
        kernel; "fold" lets the GEMMs that read it normalise by themselves, so that it needs no
        launch (and their weights are kept once more, with gamma in them, from the first such call
        on); "auto" chooses by the number of tokens, as `gemms` does.
    pdl: programmatic dependent launch on GPUs from compute capability 9.0 on: a kernel is started
        while the one before it ends, brings its weight nearer, and waits for that one's results by
        itself.
    max_shapes: how many shapes keep their bound addresses and sizes; more are re-planned.
    max_variants: how many captures are kept, one for each kind of call and state of the model that
        it was called in (attributes, hooks, parts: docs/guards.md); the longest unused goes first.
    max_cache_nbytes: what all key/value caches of a decoder's calls may take together, growing
        included; a call that would take more raises CacheFullError, and changes nothing.
    max_arenas: how many calls may run at the same time, each in memory of its own.
    cuda_graphs: replay a shape's launches as one CUDA graph from its second use on.
    max_graphs: how many such graphs are kept; the one longest unused goes first.
    padding: "packed" runs a batch of mixed lengths over its tokens alone, by what the mask says
        (docs/packed.md): a PackError at the first call where the model's graph does not keep tokens
        apart. Rows of padding are zeros in what the call returns.
    quantize: "int8" runs products by weights in int8 (docs/quantization.md): weights with a scale
        an output column, activations with one a token, found anew in every call; sums are exact,
        and all else is float as ever; "fp8" does so in e4m3, on NVIDIA GPUs from sm_89 on, with
        sums of float32. "int8-weights" quantises the weights alone, for few tokens,
        as in decoding, where the bytes of weights are what a product waits for; "int4-weights" has
        half as many, at a scale a group of 32 inputs, and keeps less.
        Results differ from the float model's by what `turbotx verify --quantize int8` says.
    keep_float: which products stay float all the same: patterns of modules' dotted names, as
        "encoder.layer.0.*", and "@head" for products whose result the call returns (logits, say).
        What is given takes the place of ("@head",).
    launch_ranges: show each launch as a range of torch.profiler, inside the one of its call. For
        looking only: launches then run one by one, without CUDA graphs.
    schedules: on a GPU, tiles of kernels by name, over what tuning and the heuristics choose.
        {"fused_add_layer_norm*": "r2w8"}: rows a program, columns (c1024), warps. {"gemm_float16*":
        "m64n32k128w4s3x2"}: tile, warps, stages, parts of k, or "cublas". {"attention*": "q64k64"}.
    """

    backend: str = "auto"
    attention: str = "auto"
    planner: str = "symbolic"
    pack_weights: bool = True
    keep_weights: bool = True
    epilogues: bool = True
    gemms: str = "auto"
    norms: str = "auto"
    pdl: bool = True
    max_shapes: int = 256
    max_variants: int = 32
    max_arenas: int = 8
    max_cache_nbytes: int | None = None
    cuda_graphs: bool = True
    max_graphs: int = 128
    padding: str = "padded"
    quantize: str = "none"
    keep_float: Sequence[str] = (HEAD,)
    launch_ranges: bool = False
    schedules: Mapping[str, str] | tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                listed = ", ".join(repr(choice) for choice in allowed)
                raise OptionsError(f"{name}={value!r} is not one of {listed}")
        if self.norms == "fold" and (self.gemms == "cublas" or not self.epilogues):
            other = "epilogues=False" if not self.epilogues else "gemms='cublas'"
            raise OptionsError(
                f"norms='fold' lets generated GEMMs normalise what they read, and {other} forbids "
                "those: leave out one of the two"
            )
        self._check_quantization()
        if not self.keep_weights and (not self.pack_weights or self.backend == "aten"):
            other = "backend='aten'" if self.pack_weights else "pack_weights=False"
            raise OptionsError(
                f"keep_weights=False keeps packed weights alone, and with {other} there are none: "
                "leave out one of the two"
            )
        if isinstance(self.schedules, Mapping):  # options are part of keys: immutable
            object.__setattr__(self, "schedules", tuple(self.schedules.items()))
        for pattern, tag in self.schedule_pairs:
            if not isinstance(pattern, str) or not isinstance(tag, str) or not _TAG.fullmatch(tag):
                raise OptionsError(
                    f"schedules={{{pattern!r}: {tag!r}}}: write rows a program, columns and warps, "
                    'each a power of two, as in "r2c1024w8", "r4" or "w8", and for GEMMs "cublas" '
                    'or as in "m64n32k128w4s3x2"'
                )
        counted = ("max_shapes", "max_variants", "max_arenas", "max_graphs", "max_cache_nbytes")
        for name in counted:
            value = getattr(self, name)
            if value is None and name == "max_cache_nbytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionsError(f"{name}={value!r} must be an integer of at least 1")

    def _check_quantization(self) -> None:
        given = self.keep_float
        if isinstance(given, str) or not all(isinstance(p, str) and p for p in given):
            raise OptionsError(
                f"keep_float={given!r} must be a list of patterns of modules' names, as "
                '("@head", "encoder.layer.0.*")'
            )
        object.__setattr__(self, "keep_float", tuple(given))
        if self.quantize != "none" and not self.pack_weights:
            raise OptionsError(
                f"quantize={self.quantize!r} computes with packed weights: leave out "
                "pack_weights=False"
            )

    @property
    def schedule_pairs(self) -> tuple[tuple[str, str], ...]:
        """`schedules` as pairs of a pattern of names and a tag of tiles."""
        given = self.schedules
        return tuple(given.items() if isinstance(given, Mapping) else given)


class OptionArguments(TypedDict, total=False):
    """The fields of `Options` as keyword arguments, for editors and type checkers."""

    backend: Literal["auto", "cpp", "triton", "aten"]
    attention: Literal["auto", "flash", "fused-softmax"]
    planner: Literal["symbolic", "chunked", "greedy"]
    pack_weights: bool
    keep_weights: bool
    epilogues: bool
    gemms: Literal["auto", "cublas", "triton"]
    norms: Literal["auto", "fold", "store"]
    pdl: bool
    max_shapes: int
    max_variants: int
    max_arenas: int
    max_cache_nbytes: int | None
    cuda_graphs: bool
    max_graphs: int
    padding: Literal["padded", "packed"]
    quantize: Literal["none", "int8", "fp8", "int8-weights", "int4-weights"]
    keep_float: Sequence[str]
    launch_ranges: bool
    schedules: Mapping[str, str]


CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in get_type_hints(OptionArguments).items()
    if get_origin(kind) is Literal
}
"""The values of the options that are one of a few words."""


def make_options(**given: Any) -> Options:
    """Return `Options(**given)`; raise OptionsError naming an unknown option and its nearest."""
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; options are {', '.join(known)}"
            raise OptionsError(f"turbotx.optimize has no option {name!r}{hint}")
    return Options(**given)
