"""What a run leaves behind: one JSON document."""

from __future__ import annotations

import json
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from benchmarks.arena import Effort
from benchmarks.circumstances import Circumstances
from benchmarks.figures import Comparison, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that one run has found, and under which circumstances."""

    circumstances: Circumstances
    effort: Effort
    comparisons: tuple[Comparison, ...]
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    """Benchmarks that cannot run here, and why."""
    failures: dict[str, str]
    """Benchmarks that broke down, and why."""

    def write(self, path: Path) -> None:
        """Write it as JSON; medians and quartiles beside the times that they are of."""
        document = asdict(self)
        for comparison, written in zip(self.comparisons, document["comparisons"], strict=True):
            for timing, entry in zip(comparison.timings, written["timings"], strict=True):
                if timing.rounds_s:
                    entry["step_s"] = asdict(timing.step_s)
        for row, entry in zip(self.rows, document["rows"], strict=True):
            entry["verdict"] = row.verdict
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what ``write`` has written; what it has derived is derived again."""
        record: Record = _read(cls, json.loads(path.read_text(encoding="utf-8")))
        return record


def _read(kind: Any, value: Any) -> Any:  # noqa: ANN401 - Of the type that the hints name.
    """Return the value of type ``kind`` that was written as JSON."""
    if isinstance(kind, types.UnionType):  # Of something, or None.
        return None if value is None else _read(get_args(kind)[0], value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {field.name: value[field.name] for field in fields(kind)}
        return kind(**{name: _read(hints[name], each) for name, each in known.items()})
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], each) for each in value)
    return value
