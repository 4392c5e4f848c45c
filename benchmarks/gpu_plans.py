"""What `gpu.py` runs: plans, each a list of groups of stages.

The stages of a group run at the same time, so only what is not timed shares one. A plan's first
groups tell whether anything is right, and what a later one needs is warm by then::

    PLANS["first"]()  ->  [[smoke, right/bert-base, ...], [latency/...], [sweep/...]]
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Set for a dry run (`gpu_standin.py`): everything is small, and nothing is measured.
DRY = bool(os.environ.get("TURBOTX_BENCHMARK_DRY"))
Shape = tuple[int, int]
HEAD: Shape = (1, 40)
MANY: Shape = (32, 128)
FEWER: tuple[Shape, ...] = (HEAD, (1, 128), (8, 128), MANY)
MODULES = ("gpu_stages", "gpu_kernels", "gpu_packed", "gpu_decode", "gpu_int8", "gpu_serving")
COMPILED = ("compile", "compile-reduce-overhead")


@dataclass(frozen=True)
class Sweep:
    """What to try at one shape. tags: pattern of kernels' names -> tiles, one change at a time;
    together: tiles of several kinds at once."""

    shape: Shape
    folded: bool
    pdl: bool
    tags: Mapping[str, Sequence[str]]
    together: Sequence[Mapping[str, str]] = ()
    runs: int = 20

    @property
    def way(self) -> str:
        return ("fold" if self.folded else "store") + "-pdl" * self.pdl


@dataclass(frozen=True)
class Stage:
    """A function of one of the modules below and its arguments, run as a process
    of its own.

    name: of the stage and of its log. limit_s: seconds after which the process is ended.
    environment: variables that it gets. wrapper: a command in front of it.
    """

    name: str
    limit_s: float
    function: str
    arguments: tuple[Any, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()

    def run(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        modules = map(importlib.import_module, MODULES)  # one at a time, the last ones need more
        found = next(f for m in modules if (f := getattr(m, self.function, None)) is not None)
        found(emit, *self.arguments)


def stage(name: str, limit_s: float, function: str, *arguments: Any) -> Stage:
    return Stage(name, limit_s, function, arguments)


def first() -> list[list[Stage]]:
    """Does it run, is it right, where does the time go: about three minutes."""
    bert = ("bert-base", "fp16")
    return [
        [
            stage("smoke", 60, "smoke"),
            stage("right/bert-base/fp16", 60, "right", *bert),
            stage("right/gpt2/fp16", 60, "right", "gpt2", "fp16", 3),
            stage("right/llama/fp16", 60, "right", "llama", "fp16", 2),
            stage("right/minilm/bf16", 60, "right", "minilm", "bf16"),
            stage("right/bert-base/fp16/no-pdl", 60, "right", *bert, 3, "no-pdl"),
            stage("right/bert-base/fp16/store", 60, "right", *bert, 3, "store"),
            stage("right/bert-base/fp16/cublas", 60, "right", *bert, 3, "cublas"),
        ],
        [stage("latency/1x40", 45, "latency", *bert, HEAD)],
        [stage("latency/32x128", 40, "latency", *bert, MANY)],
        *([stage(f"kernels/{label(s)}", 40, "kernels", *bert, s)] for s in (HEAD, MANY)),
        *tiles(),
    ]


def tiles() -> list[list[Stage]]:
    """Which tiles are fastest in a whole call, and which for rows that are reduced."""
    bert = ("bert-base", "fp16")
    return [
        [stage("sweep/few", 60, "sweep", *bert, FEW)],
        [stage("sweep/some", 60, "sweep", *bert, SOME)],
        [stage("sweep/many", 40, "sweep", *bert, MANY_TILES)],
        [stage("sweep/rows", 40, "sweep_rows", "fp16")],
    ]


def figures() -> list[list[Stage]]:
    """Everything that is claimed, beside what it is compared with: about seven minutes. What is
    timed has a process and the machine to itself: prepared processes that waited for their turn,
    those of torch.compile above all, made whatever depends on the host twice as long."""
    bert = ("bert-base", "fp16")
    compiled = [(shape, e) for shape in (HEAD, MANY) for e in COMPILED]
    timed = [
        stage("latency/1x40", 45, "latency", *bert, HEAD),
        stage("latency/32x128", 45, "latency", *bert, MANY),
        *(
            stage(f"latency/{label(shape)}/{e}", 40, "baseline", *bert, shape, e)
            for shape, e in compiled
        ),
        stage("norms", 40, "norms", *bert),
        stage("functions", 60, "functions", "fp16", True),
        stage("ceilings", 20, "ceilings"),
        stage("shapes/bert-base", 40, "shapes", *bert),
        stage("stream", 40, "stream", *bert),
        Stage("cold", 40, "first", (*bert, "cold"), {"TURBOTX_CACHE_DIR": NEW_FOLDER}),
        stage("warm-start", 40, "first", *bert, "warm"),
        stage("saved", 40, "saved", SAVED, *bert),
        *(
            stage(f"shapes/{name}", 40, "shapes", name, "fp16", FEWER)
            for name in ("minilm", "bert-large", "gpt2")
        ),
    ]
    return [
        [
            *(
                stage(f"warm/{label(shape)}/{e}", 110, "baseline", *bert, shape, e, False)
                for shape, e in compiled
            ),
            stage("right/bert-base/fp16", 110, "right", *bert),
            stage("right/bert-base/bf16", 110, "right", "bert-base", "bf16"),
            stage("right/bert-base/fp16/no-pdl", 110, "right", *bert, 3, "no-pdl"),
            stage("right/gpt2/fp16", 110, "right", "gpt2", "fp16"),
            stage("right/llama/fp16", 110, "right", "llama", "fp16", 4),
        ],
        *([one] for one in timed),
        *decode(),
        *packed(),
        proofs()[0],
    ]


def decode() -> list[list[Stage]]:
    """Decoders with a key/value cache: right, how long a step takes beside others."""
    step = ("fp16", 1, 900)
    return [
        [
            *(
                stage(f"right/decode-{name}/{dtype}", 110, "right_decode", name, dtype)
                for name in ("gpt2", "llama")
                for dtype in ("fp16", "bf16")
            ),
            *(
                stage(f"warm/decode/{name}/compile", 180, "decode_compiled", name, *step, False)
                for name in ("gpt2", "llama")
            ),
        ],
        *([stage(f"decode/{name}/fp16", 90, "decode", name, "fp16")] for name in ("gpt2", "llama")),
        *(
            [stage(f"decode/{name}/fp16/compile", 100, "decode_compiled", name, *step)]
            for name in ("gpt2", "llama")
        ),
    ]


def packed() -> list[list[Stage]]:
    """Batches of mixed lengths: right, how fast beside others, what a stream of them captures."""
    models = [(name, "fp16") for name in ("bert-base", "minilm")]
    return [
        [
            *(stage(f"right/packed-{m[0]}", 110, "packed_right", *m) for m in models),
            *(
                stage(f"warm/packed-{m[0]}/{e}", 110, "packed_baseline", *m, e, False)
                for m in models
                for e in COMPILED
            ),
        ],
        *([stage(f"packed/{m[0]}", 60, "packed_times", *m)] for m in models),
        *([stage(f"packed-stream/{m[0]}", 60, "packed_stream", *m)] for m in models),
        *(
            [stage(f"packed/{m[0]}/{e}", 60, "packed_baseline", *m, e)]
            for m in models
            for e in COMPILED
        ),
    ]


def int8() -> list[list[Stage]]:
    """Products in int8 and fp8: right, how fast beside the float program."""
    models = [(name, "fp16") for name in ("bert-base", "minilm", "bert-large")]
    return [
        [
            *(
                stage(f"right/{kind}-{m[0]}", 110, "int8_right", *m, kind)
                for kind in ("int8", "fp8")
                for m in (*((*m, 3) for m in models[:2]), ("llama", "bf16", 2))
            ),
        ],
        *([stage(f"int8/{m[0]}", 70, "int8_times", *m)] for m in models),
    ]


def weights() -> list[list[Stage]]:
    """Products by int8 and int4 weights: right, a step of a decoder by them."""
    kinds = ("int8-weights", "int4-weights")
    models = (("minilm", "fp16", 3), ("llama", "bf16", 2))
    return [
        [
            stage(f"right/{kind}-{m[0]}", 110, "int8_right", *m, kind)
            for kind in kinds
            for m in models
        ],
        *(
            [stage(f"decode/{name}/{kind}", 90, "decode", name, "fp16", (1,), (900,), kind)]
            for name in ("gpt2", "llama")
            for kind in kinds
        ),
    ]


def serving() -> list[list[Stage]]:
    """The server on a GPU: texts to vectors, prompts to tokens."""
    return [
        [stage("serve/texts", 120, "serve_texts", "fp16")],
        [stage("serve/tokens", 120, "serve_tokens", "fp16")],
    ]


def proofs() -> list[list[Stage]]:
    """Every architecture right, the device's own tests, and no access out of bounds."""
    return [
        [
            *(stage(f"architectures/{k}", 150, "architectures", k, 8) for k in range(8)),
            Stage("sanitizer", 150, "right", ("minilm", "fp16", 2), wrapper=SANITIZER),
            stage("tests", 150, "device_tests"),
        ]
    ]


def label(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


# Ways to cut the GEMMs and the attention of BERT-base, by bucket of tokens. Two launches share a
# processor where both take less than half of its 227 KB.
FEW_TAGS: dict[str, tuple[str, ...]] = {
    "gemm*2304x768*": (
        "m64n32k128s4", "m64n32k128s3", "m64n32k64s6", "m64n32k64s8", "m64n32k128s3x2",
        "m64n16k128s3",
    ),
    "gemm*3072x768*": (
        "m64n32k128s4", "m64n32k128s3", "m64n32k64s6", "m64n32k64s8", "m64n64k64s6",
    ),
    "gemm*768x768_bias_add*": (
        "m64n16k128s5x1", "m64n32k128s4x1", "m64n32k128s3x2", "m64n32k64s4x3", "m64n32k64s3x4",
        "m64n16k64s6x2", "m64n64k64s4x6",
    ),
    "gemm*768x3072*": (
        "m64n32k128s4x4", "m64n32k128s4x6", "m64n32k128s3x8", "m64n32k64s6x6", "m64n32k64s6x4",
        "m64n16k128s4x3", "m64n64k64s5x8", "m64n64k128s3x8", "m64n32k128s3x3",
    ),
    "attention*": ("q16k64w4s1", "q32k64w4s1", "q16k64w2s1", "q16k64w1s1", "q64k64w4s1"),
}  # fmt: skip
STORE_TAGS = {
    "gemm*768x768": ("m64n32k64s4x3", "m64n32k64s3x4", "m64n32k128s3x2", "m64n16k128s5x1"),
    "gemm*768x3072": ("m64n32k128s4x4", "m64n32k128s4x6", "m64n32k64s6x6"),
    "fused_add_layer_norm*": ("r1w2", "r1w4"),
}
FEW = (
    Sweep(HEAD, True, True, FEW_TAGS),
    Sweep(HEAD, False, True, STORE_TAGS),
    Sweep((1, 16), True, True, {k: tuple(t.replace("m64", "m16") for t in v)
                                for k, v in FEW_TAGS.items() if k != "attention*"}),
)  # fmt: skip
SOME_TAGS: dict[str, tuple[str, ...]] = {
    "gemm*2304x768*": (
        "m128n32k64s4", "m64n64k64s5", "m64n32k64s5", "m64n32k128s3", "m64n64k128s3",
    ),
    "gemm*3072x768*": (
        "m128n32k64s4", "m64n64k64s5", "m64n32k64s5", "m64n32k128s3", "m64n64k128s3",
    ),
    "gemm*768x768_bias_add*": (
        "m64n32k64s5x1", "m64n32k64s4x2", "m64n16k128s4x1", "m64n32k128s4x1", "m64n64k64s4x3",
    ),
    "gemm*768x3072*": (
        "m64n32k64s6x2", "m64n32k128s4x2", "m64n32k128s3x4", "m64n32k64s6x4", "m64n64k64s5x4",
        "m128n32k64s4x4",
    ),
}  # fmt: skip
SOME = (
    Sweep((1, 128), True, True, SOME_TAGS),
    Sweep((1, 192), True, True, SOME_TAGS),
    Sweep((1, 128), False, True, {}),
    Sweep((1, 192), False, True, {}),
)
MANY_TILES = (
    Sweep(
        MANY, False, True,
        {
            "gemm*3072x768*": ("m128n256k64w8s3", "cublas"),
            "attention*": ("q128k64w8s2", "q64k128w4s2", "q64k64w4s3", "q64k64w4s1", "q64k32w4s3"),
            "fused_add_layer_norm*": ("r1w2", "r1w4", "r2w2", "r2w4", "r4w4"),
            "fused_add_embedding*": ("r1w2", "r2w2"),
        },
        runs=8,
    ),
)  # fmt: skip
NEW_FOLDER = "new folder"
# Made by `gpu_ready.py`.
SAVED = "build/gpu-ready/bert-base.ttx"
# Exits with an error where a kernel reads or writes memory that is not its own.
# The driver's refusals are no such thing: an arena asks whether virtual memory is to be had.
SANITIZER = (
    "compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9",
)  # fmt: skip
PLANS: dict[str, Callable[[], list[list[Stage]]]] = {
    "first": first,
    "tiles": tiles,
    "figures": figures,
    "packed": packed,
    "int8": int8,
    "weights": weights,
    "serving": serving,
    "decode": decode,
    "proofs": proofs,
}
