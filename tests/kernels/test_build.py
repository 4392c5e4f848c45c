"""Building: cached by digest, safe side by side, and clear about what the compiler said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turbotx.errors import BuildError, BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library, cache_directory, find_compiler

UNIT = 'extern "C" int {name}(int x) {{ return x + {value}; }}\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path))


def test_built_once_and_found_again() -> None:
    units = {"one": UNIT.format(name="f", value=1), "two": UNIT.format(name="g", value=2)}
    library, built = build_library(units)
    assert built
    assert (library.f(1), library.g(1)) == (2, 3)
    again, built = build_library(units)
    assert not built
    assert again.g(2) == 4


def test_other_sources_are_another_object() -> None:
    build_library({"one": UNIT.format(name="f", value=1)})
    other, built = build_library({"one": UNIT.format(name="f", value=5)})
    assert built
    assert other.f(1) == 6


def test_a_unit_that_another_library_has_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "// model.py:3\n" + UNIT.format(name="f", value=1)
    build_library({"shared": shared, "own": UNIT.format(name="g", value=2)})
    ran: list[str] = []

    def run(command: list[str], *args: Any, **kwargs: Any) -> Any:
        ran.extend(part for part in command if part.endswith(".cpp"))
        return real(command, *args, **kwargs)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    moved = shared.replace("model.py:3", "model.py:7")
    library, built = build_library({"other": UNIT.format(name="g", value=5), "moved": moved})
    assert built and (library.f(1), library.g(1)) == (2, 6)
    assert [Path(file).name for file in ran] == ["other.cpp"]
    assert not [p for p in cache_directory().iterdir() if p.is_dir()]


def test_the_compilers_own_words() -> None:
    with pytest.raises(BuildError, match="expected"):
        build_library({"broken": "int f( {"})
    assert not list(cache_directory().glob("*.so"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoCompilerError, match="install g\\+\\+"):
        find_compiler()


def test_a_compiler_that_is_named_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompilerError, match="CXX names 'no-such-compiler', which is not"):
        find_compiler()


def test_a_cache_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(BuildWarning, match="cache cannot keep them"):
        library, built = build_library({"one": UNIT.format(name="f", value=1)})
    assert built and library.f(1) == 2
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"neither in .*cache \(Not a directory\) nor in"):
        build_library({"one": UNIT.format(name="f", value=2)})


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for name in ("TURBOTX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BuildError, match="set TURBOTX_CACHE_DIR"):
        cache_directory()


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    script = (
        "from turbotx.kernels.build import build_library\n"
        f"library, _ = build_library({{'one': {UNIT.format(name='f', value=7)!r}}})\n"
        "print(library.f(1))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in processes] == ["8", "8"]
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_flags_of_the_user_come_last_and_make_another_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    units = {"one": 'extern "C" int f() { return VALUE; }\n'}
    for value in (3, 4):
        monkeypatch.setenv("TURBOTX_CXXFLAGS", f"-O0 -DVALUE={value}")
        library, built = build_library(units)
        assert built and library.f() == value
