"""Just enough PromQL to tell which metrics a query asks for."""

from __future__ import annotations

import re

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_MATCHERS = re.compile(r"\{[^}]*\}")
_RANGE = re.compile(r"\[[^\]]*\]")
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\()\b")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "Inf", "NaN"}


def metric_names(query: str) -> set[str]:
    """Return the names of the metrics in ``query``: what is neither function, label, nor word."""
    for no_name in (_STRING, _MATCHERS, _RANGE, _LABELS):
        query = no_name.sub(" ", query)
    return set(_NAME.findall(query)) - _WORDS
