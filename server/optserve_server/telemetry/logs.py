"""Structured logs: one line for each event, as text for people or as JSON for machines.

Modules write ``_log.info("session opened", extra={"session": session_id})``: a constant message,
and the facts beside it. Facts are scalars; anything else is shown by its type alone, so that the
elements of a tensor cannot find their way into a log.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
from datetime import UTC, datetime
from typing import Literal, TypeAlias

__all__ = ["LogFormat", "configure"]

LogFormat: TypeAlias = Literal["text", "json"]

_Fact: TypeAlias = str | int | float | bool | None

# What every record has. The rest of its attributes is what ``extra`` brought.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(log_format: LogFormat, level: str) -> None:
    """Send every log record of the process, and every warning, to standard error.

    Replaces what was configured before.

    Args:
        log_format: How a record is written.
        level: Name of the lowest level that is written, in any case: ``info``.

    Raises:
        ValueError: There is no such level.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)


class _TextFormatter(logging.Formatter):
    """``2026-11-22T08:00:00.000000Z INFO optserve_server.app serving address=127.0.0.1:50051``."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname} {record.name} {_one_line(record.getMessage())}"
        return " ".join([head, *(f"{key}={_word(value)}" for key, value in _facts(record).items())])


class _JsonFormatter(logging.Formatter):
    """One object with ``time``, ``level``, ``logger``, ``message`` and the facts."""

    def format(self, record: logging.LogRecord) -> str:
        head = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Ours first, and ours last: a fact of the same name does not pass for one of them.
        return json.dumps(head | _facts(record) | head)


def _time(record: logging.LogRecord) -> str:
    """Return when it was logged, in UTC, as RFC 3339 has it."""
    time = datetime.fromtimestamp(record.created, UTC)
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _facts(record: logging.LogRecord) -> dict[str, _Fact]:
    """Return what ``extra`` brought, and the exception, if any, as one string."""
    facts = {key: _fact(value) for key, value in vars(record).items() if key not in _STANDARD}
    if record.exc_info:
        facts["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
    return facts


def _fact(value: object) -> _Fact:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no number for it.
    if value is None or isinstance(value, str | int | float):
        return value
    return f"<{type(value).__name__}>"


def _word(value: _Fact) -> str:
    """Return a fact so that a reader can tell where it ends: quoted if it has to be."""
    if isinstance(value, str):
        plain = value.isprintable() and value != "" and not any(c in value for c in ' "=\\')
        return value if plain else json.dumps(value)
    return json.dumps(value)


def _one_line(message: str) -> str:
    """Return a message without line breaks and other control characters, which are escaped."""
    return message if message.isprintable() else json.dumps(message)[1:-1]
