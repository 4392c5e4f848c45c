"""Kept program: the compiled program on disk, so that a restart neither captures nor compiles.

In: a module, a file's path. Out: something to call like the module; calls that the file has not are
compiled then and there::

    module = KeptProgram(module, program_file(folder, ...)); module(**inputs); module.keep()
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from turbotx import __version__
from turbotx.errors import InputError, TurbotxError
from turbotx.saved.load import load
from turbotx.serving.model_info import ModelInfo

log = logging.getLogger(__name__)


class KeptProgram:
    """Runs the program of a file with the module's weights, or the module optimized.

    quantize: the option of `turbotx.optimize`, which `path` is to tell apart.
    """

    def __init__(self, module: torch.nn.Module, path: Path, quantize: str = "none") -> None:
        self._module, self._path, self._quantize = module, path, quantize
        self.optimized: Any = None
        try:
            if path.exists():
                self.optimized = load(path, weights=module)
        except TurbotxError as error:  # of another version, or damaged: made anew
            log.warning("the program kept in %s is not used: %s", path, error)
        self.loaded = self.optimized is not None
        if not self.loaded:
            self.optimized = compiled(module, quantize)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Run the program; one from a file that has no such call is replaced by the module
        optimized anew."""
        try:
            return self.optimized(**inputs)
        except InputError as error:
            if not self.loaded:
                raise
            log.info("a call that the kept program has not is compiled: %s", error)
            self.optimized, self.loaded = compiled(self._module, self._quantize), False
            return self.optimized(**inputs)

    def keep(self) -> None:
        """Write what was compiled, unless it came from there. No file is no error: only slower."""
        if self.loaded:
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


def compiled(module: torch.nn.Module, quantize: str = "none") -> Any:
    """Return the module optimized."""
    # Not at the top: its imports take longer than all else that a start with a kept program does.
    from turbotx.engine.optimize import optimize

    options: Any = {"quantize": quantize}
    return optimize(module, **options)


def program_file(folder: Path, info: ModelInfo, module: torch.nn.Module) -> Path:
    """One file for each model, weights, pooling and dtype, and each version of what made it."""
    made_by = (__version__, torch.__version__, transformers.__version__, info.device)
    facts = (info.name, info.revision, info.dtype, info.head, str(module), *made_by)
    return folder / f"program-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.ttx"
