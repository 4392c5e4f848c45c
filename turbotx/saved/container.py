"""Container: the file that holds a saved model: a zip of JSON, C++, shared objects and weights.

In: entries by name. Out: a file whose every byte is covered by a digest; reading it back gives the
entries, or a SavedFileError that says what is wrong with the file::

    write_container(path, {"programs.json": b"...", "runtime.so": b"..."}, {"targets": ["cpu"]})
    manifest, entries = read_container(path)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbotx.errors import SavedFileError

FORMAT = 8
"""Raised whenever an older reader would misunderstand what is written: since 4, what a program
assumes of the state around a call; since 5, conditions on sizes of 0 and 1; since 6, programs are
`Executable`s; since 7, decisions by values of tensors."""

MANIFEST = "manifest.json"


def write_container(path: Path, entries: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Write a file atomically: a concurrent reader sees the old one or the new one."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in entries.items()}
    manifest = {"format": FORMAT, **facts, "entries": digests}
    text = json.dumps(manifest, indent=1).encode()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            archive.comment = hashlib.sha256(text).hexdigest().encode()
            archive.writestr(MANIFEST, text)
            for name, data in entries.items():
                archive.writestr(name, data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and every entry; raise SavedFileError for anything but a whole file."""
    if not path.is_file():
        raise SavedFileError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(MANIFEST)
            if hashlib.sha256(text).hexdigest().encode() != archive.comment:
                raise SavedFileError(f"{path} is damaged: its manifest is not what was written")
            manifest = json.loads(text)
            _check_format(path, manifest)
            entries = {name: archive.read(name) for name in manifest["entries"]}
    except SavedFileError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError) as error:
        raise SavedFileError(
            f"{path} is no whole file of turbotx.save, it was cut short or changed: {error}"
        ) from error
    for name, expected in manifest["entries"].items():
        if hashlib.sha256(entries[name]).hexdigest() != expected:
            raise SavedFileError(f"{path} is damaged: {name} is not what was written")
    return manifest, entries


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise SavedFileError(
            f"{path} has format {manifest.get('format')}, of turbotx {manifest.get('turbotx')}; "
            f"this turbotx reads format {FORMAT}: save the model again with this version"
        )
