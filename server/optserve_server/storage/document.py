"""Small JSON files with a checksum in them, for people and programs to read.

{"checksum": "<xxh3_128 of the content as canonical() writes it>", "content": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from optserve_server.core.storage import DamagedError, Json, StorageVersionError

FORMAT = 1


def encode_document(content: Mapping[str, Json]) -> bytes:
    """Return the bytes of a document."""
    content = {"format": FORMAT, **content}
    checksum = xxhash.xxh3_128_hexdigest(_canonical(content))
    return json.dumps({"checksum": checksum, "content": content}, indent=1).encode() + b"\n"


def decode_document(path: str, data: bytes) -> dict[str, Any]:
    """Return the content of a document.

    Raises:
        DamagedError: It is not what was written.
        StorageVersionError: A newer server wrote it.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedError(path, 0, "it is no JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("content"), dict):
        raise DamagedError(path, 0, "it is no document of this server")
    content: dict[str, Any] = document["content"]
    if document.get("checksum") != xxhash.xxh3_128_hexdigest(_canonical(content)):
        raise DamagedError(path, 0, "it is not what was written")
    if content.pop("format", None) != FORMAT:
        raise StorageVersionError(f"{path} is in a format that this server does not know")
    return content


def _canonical(content: Mapping[str, Json]) -> bytes:
    """Return the same bytes for the same content, however it was written."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
