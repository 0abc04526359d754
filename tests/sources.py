"""The files of this repository that were written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

DISTRIBUTIONS = {
    "optserve": ROOT / "protos",
    "optserve_client": ROOT / "client" / "python",
    "optserve_server": ROOT / "server",
}
"""Folder of each distribution, by the package that it holds."""

_MADE = {"build", "node_modules", "generated", "types"}  # Folders of what a command has made.


def written(suffix: str, *, below: Path = ROOT) -> list[Path]:
    """Return the files that end in ``suffix``, generated ones left out."""
    return sorted(path for path in _files(below) if path.name.endswith(suffix))


def modules(package: str) -> dict[str, Path]:
    """Return the modules of one of the packages by their full names, generated ones left out."""
    folder = DISTRIBUTIONS[package]
    paths = written(".py", below=folder / package)
    return {_module_name(path.relative_to(folder)): path for path in paths}


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in _MADE or "_pb2" in path.name:
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
