"""Container: the file of a saved model: a zip of JSON, C++, shared objects and weights.

In: entries by name, large ones as streams. Out: a file in which every byte is covered by a digest.
Reading maps it and returns the entries, or raises a SavedFileError::

    write_container(path, {"programs.json": b"...", "runtime.so": b"..."}, {"targets": ["cpu"]})
    manifest, entries = read_container(path)
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotx.errors import SavedFileError

FORMAT = 12
"""Raised whenever an older reader would misunderstand what is written: since 4, what a program
assumes of the state around a call; since 5, conditions on sizes of 0 and 1; since 6, programs are
`Executable`s; since 7, decisions by values of tensors; since 8, weights packed from their parts;
since 9, the names of hoisted constants."""

MANIFEST = "manifest.json"

PAGE = 4096
"""Streams begin at a multiple of this, so that their contents can be used in the mapped file."""
BLOCK = 16 << 20
"""A longer entry has the digest of its blocks' digests, which are computed in parallel."""
MAPPED = (".safetensors", ".panels")
"""Suffixes of entries that are used in the mapped file."""
_FILLER = 0xD935
"""Id of a zip extra field for padding, as used by Android's zipalign."""


@dataclass(frozen=True)
class Stream:
    """An entry that is written piece by piece: its size, and a function that yields the pieces."""

    nbytes: int
    pieces: Callable[[], Iterable[memoryview | bytes]]


class _Digest:
    """The digest of an entry, updated with pieces of any length."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._open, self._room = hashlib.sha256(), BLOCK

    def update(self, piece: memoryview | bytes) -> None:
        left = memoryview(piece).cast("B")
        while len(left):
            if not self._room:
                self._blocks.append(self._open.digest())
                self._open, self._room = hashlib.sha256(), BLOCK
            taken = left[: self._room]
            self._open.update(taken)
            self._room -= len(taken)
            left = left[len(taken) :]

    def hexdigest(self) -> str:
        return _join([*self._blocks, self._open.digest()])


def _join(blocks: list[bytes]) -> str:
    return blocks[0].hex() if len(blocks) == 1 else hashlib.sha256(b"".join(blocks)).hexdigest()


def write_container(
    path: Path, entries: Mapping[str, bytes | Stream], facts: Mapping[str, Any]
) -> None:
    """Write a file atomically: a concurrent reader sees the old or the new file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            digests = {name: _write(archive, name, data) for name, data in entries.items()}
            manifest = {"format": FORMAT, **facts, "entries": digests}
            text = json.dumps(manifest, indent=1).encode()
            archive.writestr(MANIFEST, text)
            archive.comment = hashlib.sha256(text).hexdigest().encode()
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the one beside it, or none
        raise


def _write(archive: zipfile.ZipFile, name: str, data: bytes | Stream) -> str:
    """Write an entry, streams at the start of a page; return its digest."""
    entry, digest = zipfile.ZipInfo(name), _Digest()
    if isinstance(data, bytes):
        digest.update(data)
        archive.writestr(entry, data)
        return digest.hexdigest()
    entry.file_size = data.nbytes
    # The same condition as in zipfile; its extra field precedes ours.
    is_large = data.nbytes * 1.05 > zipfile.ZIP64_LIMIT
    begin = archive.start_dir + 30 + len(name.encode()) + 4 + (20 if is_large else 0)
    room = -begin % PAGE
    entry.extra = _FILLER.to_bytes(2, "little") + room.to_bytes(2, "little") + bytes(room)
    with archive.open(entry, "w", force_zip64=is_large) as out:
        for piece in data.pieces():
            digest.update(piece)
            out.write(piece)
    entry.extra = b""  # not needed in the central directory
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest and all entries: tensors as private mapped memory, others as bytes.
    Raises SavedFileError unless the file is complete and intact."""
    if not path.is_file():
        raise SavedFileError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(MANIFEST)
            if hashlib.sha256(text).hexdigest().encode() != archive.comment:
                raise SavedFileError(f"{path} is damaged: its manifest is not what was written")
            manifest = json.loads(text)
            _check_format(path, manifest)
            found = {name: archive.getinfo(name) for name in manifest["entries"]}
            assert archive.fp is not None
            places = {name: _find(archive.fp.fileno(), x) for name, x in found.items()}
            damaged = _find_damaged(archive.fp.fileno(), manifest["entries"], places)
            # A private mapping: tensors over it may be written.
            whole = memoryview(mmap.mmap(archive.fp.fileno(), 0, access=mmap.ACCESS_COPY))
    except SavedFileError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError) as error:
        raise SavedFileError(
            f"{path} is not a complete file of turbotx.save, it was truncated or changed: {error}"
        ) from error
    if damaged is not None:
        raise SavedFileError(f"{path} is damaged: {damaged} is not what was written")
    entries = {name: whole[a : a + count] for name, (a, count) in places.items()}
    return manifest, {n: x if n.endswith(MAPPED) else bytes(x) for n, x in entries.items()}


def _find(file: int, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the offset and length of an entry's bytes."""
    header = os.pread(file, 30, entry.header_offset)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    rest = os.pread(file, name + extra, entry.header_offset + 30)
    fields = rest[name:]
    stored = header[:4] == b"PK\3\4" and rest[:name] == entry.filename.encode()
    stored &= header[14:18] == entry.CRC.to_bytes(4, "little")
    stored &= entry.compress_type == zipfile.ZIP_STORED
    if not stored or not all(_is_ours(*field) for field in _fields_of(fields)):
        raise zipfile.BadZipFile(f"{entry.filename} is not stored as it was written")
    return entry.header_offset + 30 + name + extra, entry.file_size


def _fields_of(extra: bytes) -> Iterator[tuple[int, bytes]]:
    while extra:
        kind, length = (int.from_bytes(extra[at : at + 2], "little") for at in (0, 2))
        yield kind, extra[4 : 4 + length]
        extra = extra[4 + length :]


def _is_ours(kind: int, content: bytes) -> bool:
    """Return whether a header field is the zip64 size field or zero padding."""
    return kind == 1 or (kind == _FILLER and not any(content))


def _find_damaged(
    file: int, digests: Mapping[str, str], places: Mapping[str, tuple[int, int]]
) -> str | None:
    """Return the name of an entry whose digest is wrong, or None. Reads the file instead of the
    mapping, so that unused parts are not mapped in."""

    def digest(block: tuple[int, int]) -> bytes:
        begin, end = block
        found = hashlib.sha256()
        while begin < end:
            piece = os.pread(file, min(1 << 20, end - begin), begin)
            if not piece:
                raise EOFError("it ends before its entries do")
            found.update(piece)
            begin += len(piece)
        return found.digest()

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        pending = {
            name: [
                workers.submit(digest, (a, min(begin + count, a + BLOCK)))
                for a in range(begin, begin + max(count, 1), BLOCK)
            ]
            for name, (begin, count) in places.items()
        }
        found = {name: _join([block.result() for block in b]) for name, b in pending.items()}
    return next((name for name, expected in digests.items() if found[name] != expected), None)


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise SavedFileError(
            f"{path} has format {manifest.get('format')}, of turbotx {manifest.get('turbotx')}; "
            f"this turbotx reads format {FORMAT}: save the model again with this version"
        )
