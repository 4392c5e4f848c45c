"""Uses: whether bytecode only writes to the container under a name, and never reads it.

In: a name and the code that runs. Out: True if each use of the name ends in a write, also to an
item of the container; its contents then do not affect that code::

    self.seen.append(x); self.kept["deep"][n] = x    ->  True for "seen", True for "kept"
    if len(self.seen) < 3: ...                       ->  False

Only the container's own methods in `WRITES` count. Everything that is not evident from the bytecode
(an alias, a branch in between, `getattr`) counts as a read.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable

WRITES = frozenset(("append", "extend", "add", "update", "__setitem__"))
_LOADS = frozenset(
    ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
)
_BY_TEXT = frozenset(("getattr", "vars", "__dict__", "attrgetter"))
_SHUFFLES = ("COPY", "SWAP", "DUP", "ROT", "UNPACK")
_METHODS = frozenset(("LOAD_METHOD", "LOAD_ATTR"))
_IDLE = frozenset(("CACHE", "EXTENDED_ARG", "NOP"))


def is_only_written(name: str, codes: Iterable[types.CodeType], local: bool = False) -> bool:
    """Return whether no code reads the contents of the container called `name`.

    local: whether the name is one of the function's own arguments.
    """
    return all(_only_writes(name, code, local) for code in codes)


def _only_writes(name: str, code: types.CodeType, local: bool) -> bool:
    if name in code.co_consts and _BY_TEXT & set(code.co_names):
        return False
    steps = [s for s in dis.get_instructions(code) if s.opname not in _IDLE]
    for k, step in enumerate(steps):
        if step.opname.startswith("LOAD_FAST"):
            named = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            if local and name in named and (len(named) > 1 or not _ends_in_write(steps, k + 1)):
                return False
        elif step.argval == name and (
            step.opname == "IMPORT_FROM"
            or (step.opname in _LOADS and not _ends_in_write(steps, k + 1))
        ):
            return False
    return True


def _ends_in_write(steps: list[dis.Instruction], start: int) -> bool:
    """Follow the container, which the step before `start` pushed on the stack."""
    above = 0  # the number of stack entries above it, or above its item
    for step in steps[start:]:
        if above == 0 and step.opname in _METHODS:
            return step.argval in WRITES
        if above == 1 and step.opname == "STORE_SUBSCR":
            return True
        if step.opname == "BUILD_SLICE":  # a slice is replaced, not appended to
            return False
        if above == 1 and step.opname == "BINARY_SUBSCR":
            above = 0
            continue
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            return False
        if step.opname.startswith(_SHUFFLES):
            return False
        above += dis.stack_effect(step.opcode, step.arg, jump=False)
        if above < 1:
            return False
    return False
