"""Every error a user of turbotx can meet, one class per kind of mistake.

A message says what was seen, where (the user's own source line when there is one) and what
to do about it, for example::

    CaptureError: cannot capture Encoder: torch.export stopped at model.py:12 ...
"""

from __future__ import annotations


class TurbotxError(Exception):
    """Base of every error that turbotx raises on purpose."""
