"""Structured logs: one JSON object a line.

In: logging records, with ``extra={"fields": {…}}`` for searchable fields. Out: lines such as::

    {"ts": "2026-01-02T03:04:05.678Z", "level": "info", "event": "request", "ms": 8.1}
"""

from __future__ import annotations

import json
import logging
import sys
import time

from turbotx.engine.logs import TOPICS


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: the message as ``event``, its fields, an exception as ``error``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "ts": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(level: str = "info") -> None:
    """Log turbotx and uvicorn to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("turbotx", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    for topic in TOPICS:  # topics enabled by TURBOTX_LOGS use the same handler
        logger = logging.getLogger(f"turbotx.{topic}")
        logger.handlers.clear()
        logger.propagate = True
