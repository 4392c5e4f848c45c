"""The commands and their options; each hands over to the file of its name.

In: `sys.argv`. Out: an exit code: 0 it worked, 1 the results are not right, 2 the command line or
MODEL is wrong, 3 turbotx could not do it. Errors are one line, and with --json one object::

    main(["compile", "minilm", "--out", "out"])
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from turbotx.cli.output import Output, exit_code
from turbotx.errors import TurbotxError

app = typer.Typer(
    name="turbotx",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A kernel compiler for transformer inference.",
    epilog="MODEL: package.module:factory, path/to/file.py:factory, hf:PATH, "
    "hf-config:TYPE[,name=value], minilm, or a .pt2 file of torch.export.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="What to compile, see below.")]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="batch=4,seq=128", help="Sizes; may be repeated."),
]
Dtype = Annotated[str, typer.Option(help="Convert the model: float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback()
def turbotx() -> None:
    """A kernel compiler for transformer inference."""


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go.")],
    shape: Shape = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="sm_90", help="Also build for: sm_80, sm_90, gfx942, ..."),
    ] = None,
    dtype: Dtype = "",
    as_json: Json = False,
) -> None:
    """Dump every stage: graphs, kernel sources, memory plan, report.html."""
    from turbotx.cli.compile import compile_model

    raise typer.Exit(compile_model(model, out, shape or (), target or (), dtype, Output(as_json)))


@app.command("verify")
def verify_command(
    model: Model,
    shape: Shape = None,
    dtype: Dtype = "",
    as_json: Json = False,
) -> None:
    """Compare every launch and the whole model with float64; exit code 1 past the rule."""
    from turbotx.cli.verify import verify_model

    raise typer.Exit(verify_model(model, shape or (), dtype, Output(as_json)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=arguments, prog_name="turbotx")
    except TurbotxError as error:
        Output("--json" in arguments).failure(error)
        sys.exit(exit_code(error))
