"""The contract explains itself: more than buf asks of its comments."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2 as pb
from sources import ROOT

_MESSAGE, _SERVICE = (
    4,
    6,
)  # Numbers of FileDescriptorProto's fields, as source_code_info names them.
_MEMBER = 2  # Of DescriptorProto's `field`, and of ServiceDescriptorProto's `method`.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[pb.FileDescriptorProto]:
    """Read the contract's files, with their comments."""
    descriptors = tmp_path_factory.mktemp("contract") / "descriptors.binpb"
    buf = Path(sys.executable).with_name("buf")
    build: list[str | Path] = [buf, "build", "--as-file-descriptor-set", "--output", descriptors]
    subprocess.run(build, cwd=ROOT / "protos", check=True)
    found = pb.FileDescriptorSet.FromString(descriptors.read_bytes()).file
    return [file for file in found if file.package == "optserve.v1"]


def test_comments_begin_with_what_they_are_about(files: list[pb.FileDescriptorProto]) -> None:
    comments = {
        f"{file.name}: {name}": comment
        for file in files
        for described in (_messages(file), _fields(file), _methods(file))
        for name, comment in described.items()
    }
    wrong = {
        name: comment
        for name, comment in comments.items()
        if not re.match(rf"{name.rpartition('.')[2].rpartition(' ')[2]}\b", comment)
    }
    assert len(comments) > 200
    assert not wrong


def test_comments_say_what_unset_means(files: list[pb.FileDescriptorProto]) -> None:
    comments = {name: comment for file in files for name, comment in _fields(file).items()}
    optional = [
        f"{message.name}.{field.name}"
        for file in files
        for message in file.message_type
        for field in message.field
        if field.proto3_optional
    ]
    assert len(optional) > 50
    assert not [name for name in optional if not re.search("Unset|Required", comments[name])]


def _messages(file: pb.FileDescriptorProto) -> dict[str, str]:
    return {
        file.message_type[path[1]].name: comment
        for path, comment in _comments(file)
        if len(path) == 2 and path[0] == _MESSAGE
    }


def _fields(file: pb.FileDescriptorProto) -> dict[str, str]:
    return {
        f"{file.message_type[path[1]].name}.{file.message_type[path[1]].field[path[3]].name}": text
        for path, text in _comments(file)
        if len(path) == 4 and (path[0], path[2]) == (_MESSAGE, _MEMBER)
    }


def _methods(file: pb.FileDescriptorProto) -> dict[str, str]:
    return {
        f"{file.service[path[1]].name}.{file.service[path[1]].method[path[3]].name}": comment
        for path, comment in _comments(file)
        if len(path) == 4 and (path[0], path[2]) == (_SERVICE, _MEMBER)
    }


def _comments(file: pb.FileDescriptorProto) -> list[tuple[list[int], str]]:
    """Return every commented path of the file; a comment's lines become one."""
    return [
        (list(location.path), " ".join(location.leading_comments.split()))
        for location in file.source_code_info.location
    ]
