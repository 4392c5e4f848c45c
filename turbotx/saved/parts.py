"""Parts: the parts of an optimized model with their own programs: calls with a cache, an encoder.

In: an engine. Out: its parts, with the mapping from a program's parameter paths to the model's;
and, for a decoder, the description needed to generate with it::

    find_parts(engine)        ->  SavedPart("", ...), SavedPart("steps", ...)
    describe_decoder(engine)  ->  {"class": "...:GPT2LMHeadModel", "config": {...}, ...}
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, cast

from turbotx.capture.cache_argument import names_of
from turbotx.engine.engine import Engine
from turbotx.engine.variant import Variant


@dataclass(frozen=True)
class SavedPart:
    """A part of a model.

    name: "" for the model's own calls, "steps" for those with a cache, "encoder".
    owner: the path of the module that the engine runs.
    """

    name: str
    engine: Any
    owner: str = ""

    def path_of(self, path: str) -> str:
        """Return a parameter's path in the model, given its path in the part."""
        if self.name == "steps":
            return path.removeprefix("model.")
        return f"{self.owner}.{path}" if self.owner else path

    def describe(self, variant: Variant) -> dict[str, Any]:
        """Return the fields that a file stores for a program of this part in addition."""
        if not self.name:
            return {}
        stepping = self.engine.find_stepping(variant) if self.name == "steps" else ()
        return {"part": self.name, "owner": self.owner, "stepping": list(stepping)}


def find_parts(engine: Engine) -> list[SavedPart]:
    """Return the model itself, and the parts of it that are saved with it."""
    found = [SavedPart("", engine)]
    steps, encoder = engine.parts.get("steps"), engine.parts.get("encoder")
    if steps is not None:
        found.append(SavedPart("steps", steps))
        if encoder is not None:
            modules = engine.model.named_modules()
            owner = next(n for n, m in modules if m.__dict__ is encoder.__dict__)
            found.append(SavedPart("encoder", encoder._turbotx_engine, owner))
    return found


def describe_decoder(engine: Engine) -> dict[str, Any] | None:
    """Return the description of a model for generation; None if no call used a cache."""
    steps = engine.parts.get("steps")
    if steps is None or not steps.shapes:
        return None
    model: Any = engine.model
    cls = type(model)
    return {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "arguments": names_of(cast(Hashable, cls)),
        "config": model.config.to_dict(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "shapes": [[s.heads, s.key_width, s.value_width] for s in steps.shapes],
        "most_nbytes": engine.options.max_cache_nbytes,
    }
