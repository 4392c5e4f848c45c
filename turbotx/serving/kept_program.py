"""Kept program: the compiled program in a file, so that a restart neither captures nor compiles.

In: a module and a file's path. Out: a callable like the module. Calls that the file has no program
for are compiled when they occur::

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
    """Runs a saved program with the module's weights, or the module optimized anew."""

    def __init__(
        self, module: torch.nn.Module, padding: Padding, path: Path | None = None,
        quantize: str = "none",
    ) -> None:  # fmt: skip
        """path: the program's file; None: nothing is saved. padding: unless "padded", calls are
        packed until ``pad`` is called. quantize: the option of ``turbotx.optimize``."""
        self._module, self._path, self._quantize = module, path, quantize
        self.packs = padding != "padded"
        self.optimized: Any = None
        try:
            if path is not None and path.exists():
                self.optimized = load(path, weights=module)
        except TurbotxError as error:  # another version, or damaged: compile again
            log.warning("the program kept in %s is not used: %s", path, error)
        self.loaded = self.optimized is not None
        if self.loaded:
            self.packs = self.optimized.packs
        else:
            self.optimized = self._compiled()

    def _compiled(self) -> Any:
        return compiled(self._module, self.packs, self._quantize)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Run a padded call; compiles the module if the saved program does not cover it."""
        return self._run(lambda module: module(**inputs))

    def packed(self, lengths: Sequence[int], **inputs: torch.Tensor) -> Any:
        """Run sequences without padding: see ``OptimizedModule.packed``. Takes and returns tensors
        (tokens, ...)."""
        return self._run(lambda module: module.packed(lengths=lengths, **inputs))

    def pad(self) -> None:
        """Switch to padded calls, for a module that cannot run packed ones."""
        self.packs = self.loaded = False
        self.optimized = self._compiled()

    def _run(self, call: Callable[[Any], Any]) -> Any:
        try:
            return call(self.optimized)
        except InputError as error:
            if not self.loaded:
                raise
            log.info("a call that the kept program has not is compiled: %s", error)
            self.optimized, self.loaded = self._compiled(), False
            return call(self.optimized)

    def keep(self) -> None:
        """Write the compiled program to the file, unless it was read from it. A failure is logged:
        the next start then compiles again."""
        if self.loaded or self._path is None:
            return
        from turbotx.saved.save import save

        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save(self.optimized, self._path, weights=False)
        except (TurbotxError, OSError) as error:
            log.warning("the program is not kept for the next start: %s", error)

    def stats(self) -> dict[str, int]:
        """Return the program's statistics: captures or programs, builds, plans, memory."""
        found: dict[str, int] = self.optimized.stats()
        return found


def compiled(module: torch.nn.Module, packs: bool, quantize: Any = "none") -> Any:
    """Return the optimized module. packs: for batches without padding."""
    # A lazy import: it takes longer than the rest of a start with a saved program.
    from turbotx.engine.optimize import optimize

    return optimize(module, padding="packed" if packs else "padded", quantize=quantize)


def program_file(folder: Path, info: ModelInfo, module: torch.nn.Module, padding: Padding) -> Path:
    """Return the program's path, which depends on model, weights, pooling, dtype, padding, and the
    versions of turbotx and its libraries."""
    made_by = (__version__, torch.__version__, transformers.__version__, info.device)
    facts = (info.name, info.revision, info.dtype, info.head, str(module), padding, *made_by)
    return folder / f"program-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.ttx"
