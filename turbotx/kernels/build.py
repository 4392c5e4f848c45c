"""Build: compiles C++ source to a shared object, cached on disk by digest.

In: translation units as text. Out: a library loaded with ctypes. The digest covers sources,
headers, compiler, flags and processor, so that a cached object always matches; processes may build
the same library concurrently. Units that are compiled together are also cached one by one, as
object files: equal attention is compiled once, whatever kernels stand beside it::

    build_library({"kernels": source})  ->  ctypes.CDLL
"""

from __future__ import annotations

import ctypes
import errno
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
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from turbotx.errors import BuildError, BuildWarning, NoCompilerError
from turbotx.kernels.openmp import share_openmp

log = logging.getLogger("turbotx.build")

# Comments in a kernel's header, which name lines of the user's model, are not part of the digest.
_COMMENTS = re.compile(r"^//.*\n", re.MULTILINE)
HEADERS = Path(__file__).parent / "cpp" / "include"
FLAGS: tuple[str, ...] = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-mno-mmx",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-fPIC",
)  # fmt: skip
# MMX registers alias the x87 unit's. Without AVX, GCC copies 8 bytes through them without EMMS,
# after which PyTorch's floor division of halves returns NaN.


def cache_directory() -> Path:
    """Return the folder of built objects: TURBOTX_CACHE_DIR, or the user's cache directory.

    Raises BuildError if the user has no home directory, as in some containers.
    """
    given = os.environ.get("TURBOTX_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if base.startswith("~"):
        raise BuildError("this user has no home directory for built kernels: set TURBOTX_CACHE_DIR")
    return Path(base) / "turbotx"


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: to a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of g++ and clang++ on the path.

    Raises NoCompilerError if it does not exist.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    if named:
        raise NoCompilerError(f"no C++ compiler: CXX names {named!r}, which is not a program")
    raise NoCompilerError(
        "no C++ compiler: install g++ or clang++, or name one in the variable CXX"
    )


@functools.cache
def _compiler_identity(compiler: str) -> str:
    """Return the compiler's version and the features that -march=native enables."""
    version = _run([compiler, "--version"]).splitlines()[0]
    target = [compiler, "-march=native", "-Q", "--help=target"]
    asked = subprocess.run(target, capture_output=True, text=True, check=False)
    return f"{version}\n{asked.stdout}\n{platform.machine()}"


@functools.cache
def _headers_digest() -> str:
    texts = [p.read_bytes() for p in sorted(HEADERS.glob("*.h"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@functools.cache
def compiler_flags() -> tuple[str, ...]:
    """Return the compiler flags, without those that this processor does not support."""
    if platform.machine() in ("x86_64", "AMD64"):
        return FLAGS
    return tuple(f for f in FLAGS if not f.startswith(("-mprefer", "-mno-mmx")))


def build_library(units: Mapping[str, str]) -> tuple[ctypes.CDLL, bool]:
    """Compile and load `units` (name -> C++ source); return the library and whether it was
    compiled.

    Raises NoCompilerError, or BuildError with the compiler's output.
    """
    compiler = find_compiler()
    flags = *compiler_flags(), *shlex.split(os.environ.get("TURBOTX_CXXFLAGS", ""))
    digest = _digest(compiler, flags, [units[name] for name in sorted(units)])
    path = cache_directory() / f"{digest}.so"
    share_openmp()
    if os.path.exists(path):
        log.debug("found %s: %s", ", ".join(units), path)
        return ctypes.CDLL(str(path)), False
    begin = time.perf_counter()
    try:
        _compile(compiler, flags, units, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        path, library = _compile_unkept(compiler, flags, units, path, error)
    log.info("compiled %s in %.1f s: %s", ", ".join(units), time.perf_counter() - begin, path)
    return library, True


def _digest(compiler: str, flags: Sequence[str], sources: Sequence[str]) -> str:
    """Return a name for what C++ sources are compiled to."""
    code = [_COMMENTS.sub("", text) for text in sources]
    identity = (_compiler_identity(compiler), _headers_digest(), *flags, *code)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:24]


def _compile_unkept(
    compiler: str, flags: tuple[str, ...], units: Mapping[str, str], path: Path, why: OSError
) -> tuple[Path, ctypes.CDLL]:
    """Compile in a temporary folder, for a cache that is not writable or mounted noexec; warn once.
    Raises BuildError if that fails too."""
    try:
        with tempfile.TemporaryDirectory(prefix="turbotx-") as folder:
            kept = Path(folder) / path.name
            _compile(compiler, flags, units, kept)
            library = ctypes.CDLL(str(kept))
    except OSError as error:
        raise BuildError(
            f"compiled kernels can be kept neither in {path.parent} ({why.strerror or why}) nor in "
            f"{tempfile.gettempdir()} ({error.strerror or error}): name a folder with room in "
            "TURBOTX_CACHE_DIR"
        ) from error
    warnings.warn(
        f"kernels are compiled again by each process: {path.parent} cannot keep them "
        f"({why.strerror or why}); name another folder in TURBOTX_CACHE_DIR",
        BuildWarning, stacklevel=2,
    )  # fmt: skip
    return kept, library


def _compile(compiler: str, flags: tuple[str, ...], units: Mapping[str, str], path: Path) -> None:
    """Compile the units in parallel, link, and move the result into place atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects, commands = [], []
        kept: dict[str, Path] = {}
        for name, source in units.items():
            file = Path(folder) / f"{name}.cpp"
            objects.append(str(file.with_suffix(".o")))
            if len(units) > 1:  # alone it is the library, which is kept
                known = path.with_name(f"{_digest(compiler, flags, [source])}.o")
                if _copy(known, objects[-1]):
                    continue
                kept[objects[-1]] = known
            file.write_text(source)
            commands.append([compiler, *flags, f"-I{HEADERS}", "-c", str(file), "-o", objects[-1]])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
            list(workers.map(_run, commands))
        linked = str(Path(folder) / path.name)
        # Linked without -fopenmp: the symbols resolve to the OpenMP library that torch has loaded.
        late = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([compiler, "-shared", *late, *objects, "-o", linked])
        for name, source in units.items():
            path.with_name(f"{path.stem}.{name}.cpp").write_text(source)
        os.replace(linked, path)
        for made, known in kept.items():
            os.replace(made, known)


def _copy(source: Path, target: str) -> bool:
    """Copy a file if it is there; tell whether it was."""
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        return False
    return True


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shown = "\n".join(done.stderr.splitlines()[:40])
        if os.strerror(errno.ENOSPC) in shown:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), command[-1])
        raise BuildError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{shown}")
    return done.stdout
