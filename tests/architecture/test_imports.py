"""Who may know whom, as server/docs/architecture.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import DISTRIBUTIONS, modules

_PROTOBUF = ("google.protobuf",)
_RICH_ERRORS = ("google.rpc",)

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "optserve": ("optserve", *_PROTOBUF),
    "optserve_client": (
        *("optserve", "optserve_client"),
        *("grpc", *_PROTOBUF, *_RICH_ERRORS),
        *("ml_dtypes", "numpy", "rich", "xxhash"),
    ),
    "optserve_client._mirror": ("optserve_client", "numpy", "torch"),
    "optserve_client.torch": ("optserve", "optserve_client", "numpy", "torch"),
    "optserve_server": (),
    "optserve_server.core": ("optserve_server.core", "torch"),
    "optserve_server.rpc": (
        *("optserve", "optserve_server.core", "optserve_server.rpc", "optserve_server.__version__"),
        *("grpc", "grpc_health", "grpc_reflection", "grpc_status", *_PROTOBUF, *_RICH_ERRORS),
        "torch",
    ),
    "optserve_server.rpc.issued": ("optserve_server.core", "optserve_server.rpc", "jwt"),
    "optserve_server.storage": (
        *("optserve_server.core.failpoints", "optserve_server.core.safetensors"),
        *("optserve_server.core.storage", "optserve_server.core.tensors"),
        *("optserve_server.storage", "torch", "xxhash"),
    ),
    "optserve_server.storage.remote": (
        *("optserve_server.core.storage", "optserve_server.storage", "fsspec"),
    ),
    "optserve_server.telemetry": (
        *("optserve_server.core.events", "optserve_server.telemetry"),
        "prometheus_client",
    ),
    "optserve_server.config": (
        *("optserve.limits", "optserve_server.core.limits"),
        *("pydantic", "pydantic_settings"),
    ),
    "optserve_server.app": ("optserve", "optserve_server", "prometheus_client", "torch"),
    "optserve_server.__main__": ("optserve_server", "pydantic"),
}
"""What a module may import beside the standard library, by the longest prefix of its name."""

_FORBIDDEN = {"_pickle", "code", "marshal", "pickle", "runpy", "shelve"}
_FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save"}

MODULES = {name: path for package in DISTRIBUTIONS for name, path in modules(package).items()}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_layer_may(module: str) -> None:
    layer = max((name for name in MAY_IMPORT if _within(module, name)), key=len)
    allowed = (*MAY_IMPORT[layer], *sys.stdlib_module_names)
    wrong = [
        target
        for target in imports(MODULES[module])
        if not any(_within(target, prefix) for prefix in allowed)
    ]
    assert not wrong, f"{module} may not import it; see MAY_IMPORT[{layer!r}]"


@pytest.mark.parametrize("module", MODULES)
def test_module_has_no_way_to_run_code_that_came_as_data(module: str) -> None:
    path = MODULES[module]
    imported = {target.partition(".")[0] for target in imports(path)} & _FORBIDDEN
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert not imported
    assert not called & _FORBIDDEN_CALLS


def test_every_layer_is_there() -> None:
    without = [layer for layer in MAY_IMPORT if not any(_within(name, layer) for name in MODULES)]
    assert not without


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        pytest.param("optserve.wire", ("numpy", "torch"), id="contract"),
        pytest.param("optserve_client", ("torch", "optserve_server"), id="client"),
        pytest.param("optserve_client.aio", ("torch", "optserve_server"), id="asyncio-client"),
    ],
)
def test_package_is_imported_without_what_it_does_not_need(
    package: str, absent: tuple[str, ...]
) -> None:
    script = f"import sys, {package}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not set(absent) & set(loaded.stdout.split())


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports anywhere in it, by full name: ``from a import b`` is ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
