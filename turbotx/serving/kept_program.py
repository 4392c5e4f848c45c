"""Kept program: the compiled program on disk, so that a restart neither captures nor compiles.

In: a module, a file's path. Out: something to call like the module; calls that the file has not are
compiled then and there::

    module = KeptProgram(module, "packed", program_file(folder, ...))
    module.packed([5, 17], input_ids=flat); module.keep()
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from turbotx import __version__
from turbotx.errors import InputError, TurbotxError
from turbotx.saved.load import load
from turbotx.serving.engine import Padding
from turbotx.serving.model_info import ModelInfo

log = logging.getLogger(__name__)


class KeptProgram:
    """Runs the program of a file with the module's weights, or the module optimized."""

    def __init__(self, module: torch.nn.Module, padding: Padding, path: Path | None = None) -> None:
        """``path`` None: nothing is kept. Without padding where ``padding`` is not "padded", until
        ``pad`` is called."""
        self._module, self._path = module, path
        self.packs = padding != "padded"
        self.optimized: Any = None
        try:
            if path is not None and path.exists():
                self.optimized = load(path, weights=module)
        except TurbotxError as error:  # of another version, or damaged: made anew
            log.warning("the program kept in %s is not used: %s", path, error)
        self.loaded = self.optimized is not None
        if self.loaded:
            self.packs = self.optimized.packs
        else:
            self.optimized = compiled(module, self.packs)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Run a padded call; where the kept program has no such call, the module optimized anew."""
        return self._run(lambda module: module(**inputs))

    def packed(self, lengths: Sequence[int], **inputs: torch.Tensor) -> Any:
        """Run sequences without padding, as ``turbotx.optimize``'s ``packed``. Tensors (tokens,
        ...), as the model gives them."""
        return self._run(lambda module: module.packed(lengths=lengths, **inputs))

    def pad(self) -> None:
        """Compile the module for padded calls: it does not take others."""
        self.packs = self.loaded = False
        self.optimized = compiled(self._module, self.packs)

    def _run(self, call: Callable[[Any], Any]) -> Any:
        try:
            return call(self.optimized)
        except InputError as error:
            if not self.loaded:
                raise
            log.info("a call that the kept program has not is compiled: %s", error)
            self.optimized, self.loaded = compiled(self._module, self.packs), False
            return call(self.optimized)

    def keep(self) -> None:
        """Write what was compiled, unless it came from there. No file is no error: only slower."""
        if self.loaded or self._path is None:
            return
        from turbotx.saved.save import save

        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save(self.optimized, self._path, weights=False)
        except (TurbotxError, OSError) as error:
            log.warning("the program is not kept for the next start: %s", error)

    def stats(self) -> dict[str, int]:
        """Return the program's counts: captures or programs, builds, plans, memory."""
        found: dict[str, int] = self.optimized.stats()
        return found


def compiled(module: torch.nn.Module, packs: bool) -> Any:
    """Return the module optimized, for batches without padding or with it."""
    # Not at the top: its imports take longer than all else that a start with a kept program does.
    from turbotx.engine.optimize import optimize

    return optimize(module, padding="packed") if packs else optimize(module)


def program_file(folder: Path, info: ModelInfo, module: torch.nn.Module, padding: Padding) -> Path:
    """One file for each model, weights, pooling, dtype and way to pad, and each version of what
    made it."""
    made_by = (__version__, torch.__version__, transformers.__version__, info.device)
    facts = (info.name, info.revision, info.dtype, info.head, str(module), padding, *made_by)
    return folder / f"program-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.ttx"
