"""What is in the file of a checkpoint, read as anybody would who has no library for it."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from optserve_client.conform.documents import Document

_LENGTH_BYTES = 8
_DATA_TYPES = {"F16": "FP16", "BF16": "BF16", "F32": "FP32", "F64": "FP64", "I64": "INT64"}


def checkpoint_document(path: Path) -> Document:
    """Return the document of a file: its tensors by name, and what its metadata says in numbers."""
    content = path.read_bytes()
    begin = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:begin])
    metadata, values = header.pop("__metadata__"), content[begin:]
    return {
        "tensors": [_tensor(name, header[name], values) for name in sorted(header)],
        "rates": json.loads(metadata["rates"]),
        "numbers": json.loads(metadata["numbers"]),
    }


def _tensor(name: str, entry: Document, values: bytes) -> Document:
    first, last = entry["data_offsets"]
    data = values[first:last]
    return {
        "name": name,
        "data_type": _DATA_TYPES[entry["dtype"]],
        "shape": entry["shape"],
        "data": base64.b64encode(data).decode("ascii"),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
