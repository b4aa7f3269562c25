"""One JSON line on stderr for each thing that happened: what, when, numbers and names, never a prompt's text."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone

Value = str | int | float | bool | None


def event(name: str, **fields: Value) -> None:
    """Writes one line, whole: {"time": …, "event": name, …}; fields that are None are left out."""
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": name}
    given = {key: value for key, value in fields.items() if value is not None}
    sys.stderr.write(json.dumps({**line, **given}) + "\n")
    sys.stderr.flush()


def failure(name: str, error: BaseException, **fields: Value) -> None:
    """One line for a fault of ours or of an engine, with where it happened."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    event(name, error=f"{type(error).__name__}: {error}", trace=trace, **fields)


def adopt(level: int = logging.WARNING) -> None:
    """Sends what libraries log, from ``level`` up, the same way."""
    logging.basicConfig(handlers=[_Lines()], level=level, force=True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        trace = None
        if record.exc_info is not None:
            trace = "".join(traceback.format_exception(*record.exc_info))
        event("log", level=record.levelname, logger=record.name, message=record.getMessage(), trace=trace)
