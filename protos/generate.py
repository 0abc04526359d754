"""Generate everything that follows from the .proto files, or check that it is current.

    python protos/generate.py            write the stubs, help.json and surface.txt
    python protos/generate.py --check    write nothing; exit 1 and name what is out of date

Needs requirements-generate.txt: grpcio-tools of the oldest version that we promise to run with,
because stubs refuse a runtime that is older than their generator.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from google.protobuf import descriptor_pb2 as pb
from google.protobuf import descriptor_pool, message_factory, text_format

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("optserve") / "v1"
CATALOGUE = ("optimizer.proto", "scheduler.proto", "loss.proto")  # Listed with a line of help.


def main() -> int:
    """Write or check; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        generate(target)
        wanted = {path.relative_to(target): path.read_bytes() for path in _files(target)}
    present = {
        path.relative_to(ROOT): path.read_bytes()
        for path in [*_files(ROOT / PACKAGE), *ROOT.glob("surface.txt")]
        if _is_generated(path)
    }
    if "--check" not in sys.argv[1:]:
        for path in present.keys() - wanted.keys():
            (ROOT / path).unlink()
        for path, content in wanted.items():
            (ROOT / path).write_bytes(content)
        return 0
    paths = wanted.keys() | present.keys()
    stale = sorted(str(path) for path in paths if wanted.get(path) != present.get(path))
    for name in stale:
        print(f"protos/{name} is out of date: run `make generate`", file=sys.stderr)
    return 1 if stale else 0


def generate(target: Path) -> None:
    """Write the stubs, the help texts and the golden surface of every .proto below ``target``."""
    protos = [str(path.relative_to(ROOT)) for path in sorted((ROOT / PACKAGE).glob("*.proto"))]
    descriptors = target / "descriptors.binpb"
    scripts = Path(sys.executable).parent  # protoc looks its plug-ins up on the PATH.
    protoc = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}"]
        + [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy")]
        + [f"--mypy_grpc_out={target}", f"--descriptor_set_out={descriptors}"]
        + ["--include_imports", "--include_source_info", *protos],
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if protoc.returncode:
        sys.exit(protoc.stderr)
    for path in target.rglob("*_pb2_grpc.py*"):
        if "Stub" not in path.read_text():
            path.unlink()  # A file without a service has nothing to say.
    files = _parsed(descriptors.read_bytes())
    descriptors.unlink()
    listed = [file for file in files if file.name.rpartition("/")[2] in CATALOGUE]
    help_texts = {name: text for file in listed for name, text in _help_texts(file)}
    (target / PACKAGE / "help.json").write_text(json.dumps(help_texts, indent=0) + "\n")
    surface = [f"{line}\n" for file in files for line in _surface(file)]
    (target / "surface.txt").write_text("".join(surface))


def _parsed(descriptors: bytes) -> list[pb.FileDescriptorProto]:
    """Return the contract's files, with the options that the contract itself defines.

    The descriptors that protobuf comes with do not know them: those in the set do.
    """
    pool = descriptor_pool.DescriptorPool()
    for file in pb.FileDescriptorSet.FromString(descriptors).file:
        pool.AddSerializedFile(file.SerializeToString())
    described = pool.FindMessageTypeByName(pb.FileDescriptorSet.DESCRIPTOR.full_name)
    parsed = message_factory.GetMessageClass(described).FromString(descriptors)
    files = cast("pb.FileDescriptorSet", parsed).file  # The same message, of the other pool.
    return [file for file in files if Path(file.package.replace(".", "/")) == PACKAGE]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _is_generated(path: Path) -> bool:
    is_stub = "_pb2" in path.name and path.suffix in (".py", ".pyi")  # Not what Python compiles.
    return is_stub or path.name in ("help.json", "surface.txt")


def _help_texts(file: pb.FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """Yield (Message, help) and (Message.field, help).

    The first sentence of each comment, without "lr is".
    """
    for location in file.source_code_info.location:
        path, comment = location.path, " ".join(location.leading_comments.split())
        if len(path) not in (2, 4) or path[0] != 4 or not comment:
            continue
        message = file.message_type[path[1]]
        if len(path) == 2:
            name = own = message.name
        elif path[2] == 2:
            own = message.field[path[3]].name
            name = f"{message.name}.{own}"
        else:
            continue
        sentence = re.split(r"(?<=[.])\s", comment)[0]
        yield name, re.sub(rf"^{own} (is|are) ", "", sentence).rstrip(".")


def _surface(file: pb.FileDescriptorProto) -> Iterator[str]:
    """Yield a line for each thing that a change of the contract can break."""
    for service in file.service:
        for rpc in service.method:
            request = ("stream " if rpc.client_streaming else "") + rpc.input_type
            response = ("stream " if rpc.server_streaming else "") + rpc.output_type
            yield f"rpc {file.package}.{service.name}.{rpc.name} ({request}) -> ({response})"
    for enum in file.enum_type:
        for value in enum.value:
            yield f"enum {file.package}.{enum.name} {value.number} {value.name}"
        for each in enum.reserved_range:  # With their last one; a message's are without.
            yield f"reserved {file.package}.{enum.name} {each.start} to {each.end}"
        for name in enum.reserved_name:
            yield f"reserved {file.package}.{enum.name} {name}"
    for extension in file.extension:
        kind, extended = extension.type_name, extension.extendee
        yield f"extension {file.package}.{extension.name} {extension.number} {kind} of {extended}"
    for message in file.message_type:
        yield f"message {file.package}.{message.name}"
        for field in message.field:
            yield f"field {file.package}.{message.name} {field.number} {_described(field, message)}"
        for numbers in message.reserved_range:
            yield f"reserved {file.package}.{message.name} {numbers.start} to {numbers.end - 1}"
        for name in message.reserved_name:
            yield f"reserved {file.package}.{message.name} {name}"


def _described(field: pb.FieldDescriptorProto, message: pb.DescriptorProto) -> str:
    """Return a field's label, type, name, oneof and options: a tighter constraint breaks too."""
    kind = field.type_name or pb.FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    repeated = field.label == pb.FieldDescriptorProto.LABEL_REPEATED
    label = "repeated " if repeated else "optional " if field.proto3_optional else ""
    in_oneof = field.HasField("oneof_index") and not field.proto3_optional
    oneof = f" oneof {message.oneof_decl[field.oneof_index].name}" if in_oneof else ""
    options = text_format.MessageToString(field.options, as_one_line=True)
    return f"{label}{kind} {field.name}{oneof} {options}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
