"""Build: C++ source becomes a shared object, compiled once and kept on disk by digest.

In: translation units as text. Out: a loaded library whose functions ctypes can call. The digest
covers the sources, the headers, the compiler, its flags and the processor, so that a cached
object is never the wrong one; two processes may build the same at once::

    build_library({"kernels": source})  ->  ctypes.CDLL
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from turbotx.errors import BuildError, NoCompilerError
from turbotx.kernels.openmp import share_openmp

log = logging.getLogger("turbotx.build")

# A kernel's header names lines of the user's model: moving them is no reason to compile again.
_COMMENTS = re.compile(r"^//.*\n", re.MULTILINE)
HEADERS = Path(__file__).parent / "cpp" / "include"
FLAGS: tuple[str, ...] = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-fPIC",
)  # fmt: skip


def cache_directory() -> Path:
    """Return where built objects are kept: TURBOTX_CACHE_DIR, or the user's cache directory."""
    given = os.environ.get("TURBOTX_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "turbotx"


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of g++ and clang++ on the path.

    Raises NoCompilerError where there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoCompilerError(
        "no C++ compiler: install g++ or clang++, or name one in the variable CXX"
    )


@functools.cache
def _compiler_identity(compiler: str) -> str:
    """Return the compiler's version and the processor features that -march=native stands for."""
    version = _run([compiler, "--version"]).splitlines()[0]
    target = [compiler, "-march=native", "-Q", "--help=target"]
    asked = subprocess.run(target, capture_output=True, text=True, check=False)
    return f"{version}\n{asked.stdout}\n{platform.machine()}"


@functools.cache
def _headers_digest() -> str:
    texts = [p.read_bytes() for p in sorted(HEADERS.glob("*.h"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@functools.cache
def compiler_flags(compiler: str) -> tuple[str, ...]:
    """Return the flags to compile with, those left out that the compiler or the processor lacks."""
    flags = FLAGS
    if platform.machine() not in ("x86_64", "AMD64"):
        flags = tuple(f for f in flags if not f.startswith("-mprefer"))
    return flags


def build_library(units: Mapping[str, str]) -> tuple[ctypes.CDLL, bool]:
    """Compile and load `units` (name -> C++ source); tell also whether it had to be compiled.

    Raises NoCompilerError, or BuildError with the compiler's own words.
    """
    compiler = find_compiler()
    flags = *compiler_flags(compiler), *shlex.split(os.environ.get("TURBOTX_CXXFLAGS", ""))
    code = {name: _COMMENTS.sub("", text) for name, text in units.items()}
    identity = (_compiler_identity(compiler), _headers_digest(), *flags, *sorted(code.items()))
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
    path = cache_directory() / f"{digest}.so"
    built = False
    if not path.exists():
        begin = time.perf_counter()
        _compile(compiler, flags, units, path)
        built = True
        log.info("compiled %s in %.1f s: %s", ", ".join(units), time.perf_counter() - begin, path)
    else:
        log.debug("found %s: %s", ", ".join(units), path)
    share_openmp()
    return ctypes.CDLL(str(path)), built


def _compile(compiler: str, flags: tuple[str, ...], units: Mapping[str, str], path: Path) -> None:
    """Compile the units side by side, link, and move the result into place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        commands = []
        for name, source in units.items():
            file = Path(folder) / f"{name}.cpp"
            file.write_text(source)
            objects.append(str(file.with_suffix(".o")))
            commands.append([compiler, *flags, f"-I{HEADERS}", "-c", str(file), "-o", objects[-1]])
        with ThreadPoolExecutor(max_workers=min(len(commands), os.cpu_count() or 1)) as workers:
            list(workers.map(_run, commands))
        linked = str(Path(folder) / path.name)
        # How many threads to use is asked of the OpenMP library that torch has loaded, if any.
        late = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([compiler, "-shared", *late, *objects, "-o", linked])
        for name, source in units.items():
            path.with_name(f"{path.stem}.{name}.cpp").write_text(source)
        os.replace(linked, path)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shown = "\n".join(done.stderr.splitlines()[:40])
        raise BuildError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{shown}")
    return done.stdout
