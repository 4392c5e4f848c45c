"""The commands and their options; each calls the file of its name.

In: `sys.argv`. Out: an exit code: 0 success, 1 wrong results, 2 wrong command line or MODEL, 3
turbotx could not do it, 4 internal error, 130 interrupted. Errors are one line, or with --json one
object::

    run_command(["compile", "minilm", "--out", "out"])
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from turbotx import __version__
from turbotx.cli.interrupts import INTERRUPTED
from turbotx.cli.output import MISUSED, Output, exit_code
from turbotx.cli.serve import serve_command
from turbotx.engine.logs import read_logs
from turbotx.errors import InputError

# Commands import PyTorch and the rest when they run, so that --help and a mistyped command respond
# immediately.
if TYPE_CHECKING:
    from turbotx.cli.models import Source

# Typer depends on Click in some versions and vendors it in others.
UsageError: Any = typer.BadParameter.__base__
app = typer.Typer(
    name="turbotx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A kernel compiler for transformer inference.",
    epilog="MODEL: package.module:factory, path/to/file.py:factory, hf:PATH, "
    "hf-config:TYPE[,name=value], minilm, a .pt2 file of torch.export, or a .ttx file of "
    "turbotx save.",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory, path/to/file.py:factory, hf:PATH, hf-config:TYPE, minilm, "
        "FILE.pt2 or FILE.ttx (docs/command_line.md).",
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="batch=4,seq=128", help="Sizes; may be repeated."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Convert the model.")
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Take the weights from safetensors, .npz or a state dict."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="sm_90", help="cpu or a GPU, present or not: sm_80, sm_90, ..."
    ),
]
Quantize = Annotated[
    str,
    typer.Option(metavar="int8|fp8|int8-weights|int4-weights", help="Quantise matrix products."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"turbotx {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
) -> None:
    """A kernel compiler for transformer inference."""  # noqa: D401  (what --help shows)


def _source(model: str, dtype: str | None, weights: Path | None, quantize: str = "") -> Source:
    from turbotx.cli.models import Source

    return Source(model, dtype or "", weights, quantize)


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go.")
    ] = None,
    shape: Shape = None,
    target: Targets = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one file for turbotx.load, for every --target."),
    ] = None,
    dtype: Dtype = None,
    weights: Weights = None,
    quantize: Quantize = "",
    verify: Annotated[
        bool, typer.Option("--verify", help="Also run every launch against float64.")
    ] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Compile the program without padding.")
    ] = False,
    stage: Annotated[
        str,
        typer.Option(metavar="NAME", help="Print captured, fused, triton, cpp, memory or report."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Dump every stage: graphs, kernel sources, memory plan, report.html."""
    from turbotx.cli.compile import compile_model, print_stage
    from turbotx.cli.save import save_model

    source = _source(model, dtype, weights, quantize)
    if stage:
        raise typer.Exit(print_stage(source, stage, shape or (), Output(as_json)))
    if out is None and save is not None:
        raise typer.Exit(save_model(source, save, target or (), Output(as_json), packed))
    if out is None:
        raise InputError("compile needs --out DIR, --save FILE, or --stage NAME to print one stage")
    chosen = (out, shape or (), target or (), verify, save, packed)
    raise typer.Exit(compile_model(source, *chosen, Output(as_json)))


@app.command("save")
def save_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.ttx", help="The file to write.")],
    target: Targets = None,
    dtype: Dtype = None,
    weights: Weights = None,
    quantize: Quantize = "",
    as_json: Json = False,
) -> None:
    """Write one file that turbotx.load runs, without tracing or a compiler."""
    from turbotx.cli.save import save_model

    source = _source(model, dtype, weights, quantize)
    raise typer.Exit(save_model(source, out, target or (), Output(as_json)))


@app.command("verify")
def verify_command(
    model: Model,
    shape: Shape = None,
    dtype: Dtype = None,
    weights: Weights = None,
    quantize: Quantize = "",
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that a .ttx file was saved from."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every launch and the whole model with float64; exit code 1 past the rule."""
    from turbotx.cli.verify import verify_model

    source = _source(model, dtype, weights, quantize)
    raise typer.Exit(verify_model(source, reference, shape or (), Output(as_json)))


@app.command("profile")
def profile_command(
    model: Model,
    shape: Shape = None,
    runs: Annotated[int, typer.Option(help="Number of runs; times are medians.")] = 30,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Chrome trace to this file.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write report.html to this file."),
    ] = None,
    dtype: Dtype = None,
    weights: Weights = None,
    quantize: Quantize = "",
    as_json: Json = False,
) -> None:
    """Time every launch: bytes, bandwidth, by kernel and by module."""
    from turbotx.cli.profile import profile_model

    source = _source(model, dtype, weights, quantize)
    raise typer.Exit(profile_model(source, shape or (), runs, trace, page, Output(as_json)))


@app.command("tune")
def tune_command(
    model: Model,
    shape: Shape = None,
    dtype: Dtype = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Time the tiles of every kernel on this GPU, and remember the fastest."""
    from turbotx.cli.tune import tune_model

    raise typer.Exit(tune_model(_source(model, dtype, weights), shape or (), Output(as_json)))


@app.command("bench")
def bench_command(
    model: Model,
    shape: Shape = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", metavar="NAME", help="turbotx, eager, compile, onnxruntime, ..."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every engine.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads of every engine; 0: PyTorch's.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Uncounted calls at first.")] = 3,
    calls: Annotated[int, typer.Option(min=1, help="Calls per turn, fewer if they are long.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Threads that call at the same time.")] = 1,
    dtype: Dtype = None,
    weights: Weights = None,
    quantize: Quantize = "",
    as_json: Json = False,
) -> None:
    """Compare with eager, torch.compile, ONNX Runtime and the GEMMs alone."""
    from turbotx.cli.bench.command import bench_model
    from turbotx.cli.bench.runner import CallPattern

    source = _source(model, dtype, weights, quantize)
    load = CallPattern(rounds, threads or None, warmup, calls, streams)
    raise typer.Exit(bench_model(source, shape or (), engine or (), load, Output(as_json)))


@app.command("diff")
def diff_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="A report.json.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Compare two reports; exit code 1 where they differ in more than times."""
    from turbotx.cli.diff import diff_reports

    raise typer.Exit(diff_reports(before, after, Output(as_json)))


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Say what this machine can run, what is missing and how to get it."""
    from turbotx.cli.doctor import doctor

    raise typer.Exit(doctor(Output(as_json)))


app.command("serve")(serve_command)


def run_command(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, formatted = "--json" in arguments, warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        read_logs()
        # Not standalone, so that a wrong command line also gives an object with --json.
        sys.exit(app(args=arguments, prog_name="turbotx", standalone_mode=False))
    except UsageError as error:
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        elif as_json:
            print(json.dumps({"error": message, "kind": "UsageError", "exit_code": MISUSED}))
        else:
            path = error.ctx.command_path if error.ctx else "turbotx"
            message = message.replace("Value error, ", "").rstrip(".")
            Output(as_json).line(f"error: {message}. See {path} --help.")
        sys.exit(MISUSED)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except Exception as error:
        Output(as_json).failure(error)
        sys.exit(exit_code(error))
    finally:
        warnings.formatwarning = formatted
