"""Every command and snippet of README and docs, from an installed wheel outside of the checkout.

In: the pages as they stand. Out: exit codes; what is not run is in `not_run.py`, with its reason.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.docs.not_run import GIVEN, NOT_RUN
from tests.docs.snippets import PAGES, ROOT, commands, python_blocks
from tests.newcomer import MODEL, Newcomer, wait_until_ready


def is_run(page: str, text: str) -> bool:
    return not any(page == p and text.startswith(start) for p, start in NOT_RUN)


def run_here(page: str) -> list[str]:
    return [c for c in commands(page) if is_run(page, c)]


def is_server(command: str) -> bool:
    return command.startswith(("turbotx serve", "curl"))


def is_left_out(page: str, command: str) -> bool:
    """Tell whether another command says the same and more, or the same on an earlier page. One that
    saves a model is run on each page, for those that read the file."""
    words = Counter(shlex.split(command))
    others = [(p, Counter(shlex.split(c))) for p in PAGES for c in run_here(p)]
    more = any(words < other for _, other in others)
    return not any(w.endswith(".ttx") for w in words) and (
        more or page != next(p for p, other in others if other == words)
    )


WITH_COMMANDS = [
    p for p in PAGES if any(not is_server(c) and not is_left_out(p, c) for c in run_here(p))
]
SERVERS = {
    c: [asked for p in PAGES if c in run_here(p) for asked in run_here(p) if asked[:4] == "curl"]
    for c in dict.fromkeys(c for p in PAGES for c in run_here(p) if c.startswith("turbotx serve"))
}
"""A command that serves, on however many pages: what those pages then ask it."""
WITH_PYTHON = [p for p in PAGES if any(is_run(p, code) for code in python_blocks(p))]


@pytest.fixture
def place(newcomer: Newcomer, minilm_path: Path) -> Newcomer:
    """The files that the pages speak of: path/to/file.py, and models as directories."""
    folder = newcomer.folder / "path" / "to"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file.py").write_text(MODEL.replace("def make()", "def factory()"))
    for link in (folder / "model", newcomer.folder / "my-model"):
        if not link.exists():
            link.symlink_to(minilm_path)
    return newcomer


def test_what_is_not_run_is_there() -> None:
    for page, start in NOT_RUN:
        known = [*commands(page), *python_blocks(page)]
        assert any(text.startswith(start) for text in known), f"{page} has no {start!r}"
    assert set(GIVEN) <= set(WITH_PYTHON)
    assert (
        any(SERVERS.values())
        and "README.md" in WITH_COMMANDS
        and "docs/command_line.md" in WITH_COMMANDS
    )


def test_a_command_that_says_less_is_left_to_another() -> None:
    assert is_left_out("README.md", "turbotx verify minilm")
    assert not is_left_out("docs/command_line.md", "turbotx verify minilm --shape batch=1,seq=1")
    assert not is_left_out("README.md", "turbotx doctor")


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands(page: str, place: Newcomer) -> None:
    for command in run_here(page):
        words = shlex.split(command)
        if is_server(command) or is_left_out(page, command):
            continue
        if words[0] == "turbotx":
            place.run_forked(*words)
        else:
            place.run(*words)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["raise ValueError('seen')", "import sys; sys.exit('seen')"])
def test_a_page_that_fails_is_seen(ends: str, place: Newcomer) -> None:
    (place.folder / "failing_page.py").write_text(ends)
    with pytest.raises(AssertionError, match="seen"):
        place.run_forked("python", "failing_page.py")
    with pytest.raises(AssertionError, match="NoSuchModel"):
        place.run_forked("turbotx", "compile", "NoSuchModel")


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python(page: str, place: Newcomer) -> None:
    """A page's blocks are one program, in their order."""
    blocks = [code for code in python_blocks(page) if is_run(page, code)]
    program = place.folder / f"{Path(page).stem}_page.py"
    program.write_text("\n".join([GIVEN.get(page, ""), *blocks]))
    place.run_forked("python", str(program))


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVERS)
def test_servers(command: str, place: Newcomer) -> None:
    """As they stand but for the port, which another process may have; each is asked and stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = shlex.split(command.replace(" --port 8080", ""))
    server = subprocess.Popen(
        [str(place.bin / words[0]), *words[1:], "--port", port],
        cwd=place.folder, env=place.environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/ready")
        for asked in SERVERS[command] if shutil.which("curl") is not None else ():
            said = place.run(*shlex.split(asked.replace("localhost:8080", f"127.0.0.1:{port}")))
            assert "error" not in said
    finally:
        server.terminate()
        _, said = server.communicate(timeout=60)
    assert server.returncode == 0, said
    assert f"http://127.0.0.1:{port}" in said and "ready: " in said


def test_the_containers_of_the_guide_are_well_formed() -> None:
    """Nothing runs a container here: its files are parsed, its command is one of turbotx's."""
    text = (ROOT / "docs/guide.md").read_text()
    parts = [part.partition("```")[0] for part in text.split("```yaml\n")[1:]]
    compose, kubernetes = parts
    service = yaml.safe_load(compose)["services"]["embeddings"]
    kinds = [d["kind"] for d in yaml.safe_load_all(kubernetes)]
    assert kinds == ["Deployment", "Service"] and "/ready" in service["healthcheck"]["test"][-1]
    (image,) = [part.partition("```")[0] for part in text.split("```dockerfile\n")[1:]]
    line = next(x for x in image.splitlines() if x.startswith("CMD"))
    words = yaml.safe_load(line.removeprefix("CMD "))
    from turbotx.cli.serve import serve_command

    options = {f"--{name.replace('_', '-')}" for name in serve_command.__annotations__}
    assert words[:2] == ["turbotx", "serve"] and {w for w in words if w.startswith("--")} <= options
