"""Who comes to a server that is closed to strangers, and with what."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jwt
from certificates import Authority, Identity, ServerFiles, tls_channel, token_file
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from drivers import take
from drivers_core import registry_on
from drivers_grpc import StubDriver
from event_loop import EventLoopThread
from faults.checkpointing import Checkpoints
from faults.disks import MemoryDisk
from faults.durable import HERE
from faults.ground import Ground, Scene, rich_spec
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from refusals import RefusedError
from scenarios.models import gradients, model

from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.rpc.access import Access
from optserve_server.rpc.issued import FileKeys, IssuedTokens
from optserve_server.rpc.server import Server
from optserve_server.rpc.tls import server_credentials
from optserve_server.rpc.tokens import Tokens
from optserve_server.storage.local import LocalStorage

OWNER, NEIGHBOUR = "alice", "bob"
OWNER_TOKEN, NEIGHBOUR_TOKEN = "alices-token", "bobs-token"
ISSUER, AUDIENCE = "https://issuer.example", "optserve.example"
CHECKPOINT = "best"
TIMEOUT_S = 10.0
LEEWAY_S = 5

_Key = ec.EllipticCurvePrivateKey


class Provider:
    """An identity provider."""

    def __init__(self) -> None:
        self.key, self._foreign = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def key_set(self, *names: str) -> str:
        """Return its public key as a JSON Web Key Set, under each of the names."""
        key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        return json.dumps({"keys": [{**key, "kid": name, "use": "sig"} for name in names]})

    def token(self, tenant: object = OWNER, *, key_id: str = "one", **claims: object) -> str:
        """Issue a token, with other claims than it should have if they are given."""
        return self._signed(self._claims(tenant, claims), self.key, "ES256", key_id)

    def bad_tokens(self) -> dict[str, str]:
        """Return tokens for the owner that must not be accepted."""
        right, now = self._claims(OWNER, {}), time.time()
        secret = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        header, claims, signature = self.token().split(".")
        return {
            "expired": self.token(exp=now - 60),
            "not yet valid": self.token(nbf=now + 600),
            "of another issuer": self.token(iss="https://other.example"),
            "for another audience": self.token(aud="other.example"),
            "without an end": self.token(exp=None),
            "without an audience": self.token(aud=None),
            "without a tenant": self.token(None),
            "with an empty tenant": self.token(""),
            "with a number for a tenant": self.token(claimed_tenant=1),
            "signed by nobody": self._signed(right, None, "none", "one"),
            "signed by somebody else": self._signed(right, self._foreign, "ES256", "one"),
            "signed with a key that nobody knows": self.token(key_id="two"),
            "signed with the public key as a secret": _hmac_signed(right, secret),
            "with another's claims": ".".join(
                [header, self.token(NEIGHBOUR).split(".")[1], signature]
            ),
            "without its signature": f"{header}.{claims}.",
            "with a header too deep": _base64(b"[" * 5000) + "." + claims + "." + signature,
        }

    def _claims(self, tenant: object, others: dict[str, object]) -> dict[str, object]:
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "exp": time.time() + 600,
            "claimed_tenant": tenant,
            **others,
        }
        return {name: claim for name, claim in claims.items() if claim is not None}

    def _signed(
        self, claims: dict[str, object], key: _Key | None, algorithm: str, key_id: str
    ) -> str:
        headers = {"kid": key_id} if key_id else None
        return jwt.encode(claims, key or "", algorithm=algorithm, headers=headers)


def _hmac_signed(claims: dict[str, object], secret: bytes) -> str:
    """Sign as PyJWT refuses to."""
    header = {"alg": "HS256", "typ": "JWT", "kid": "one"}
    signed = ".".join(_base64(json.dumps(each).encode()) for each in (header, claims))
    return f"{signed}.{_base64(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedGround:
    """A server that asks who calls, and a session of the owner's that has stepped and was saved."""

    where: Ground
    """As its owner has it."""
    address: str
    authority: Authority
    provider: Provider
    certificates: bool
    """Whether certificates say who calls, and not tokens."""

    def channel(self, *, token: str | None = None, client: Identity | None = None) -> grpc.Channel:
        """Come with something to show, or nothing."""
        return tls_channel(self.address, self.authority.root, client=client, token=token)

    def look(self) -> tuple[Scene, dict[str, bytes]]:
        """Look at everything that the owner has, its checkpoints with it."""
        checkpoints = Checkpoints(self.where.driver)
        saved = {
            f"{each.session_id}/{each.name}": checkpoints.download(each.session_id, each.name)[1]
            for each in checkpoints.page().checkpoints
        }
        return self.where.look(), saved

    def neighbour(self) -> grpc.Channel:
        """Come as another tenant."""
        if self.certificates:
            return self.channel(client=self.authority.client(common_name=NEIGHBOUR))
        return self.channel(token=NEIGHBOUR_TOKEN)


@contextmanager
def closed_ground(folder: Path, *, certificates: bool = False) -> Iterator[ClosedGround]:
    """Serve a session over TLS to those who show who they are."""
    authority, provider = Authority(), Provider()
    files = ServerFiles.of(folder, authority.server())
    client_ca = folder / "clients.pem"
    client_ca.write_bytes(authority.root)
    credentials = server_credentials(
        files.certificate, files.key, client_ca if certificates else None
    )
    access = Access(certificates=True) if certificates else _token_access(folder, provider)
    with (
        EventLoopThread() as loop,
        _disk() as persistence,
        registry_on(loop, Limits(), persistence=persistence) as registry,
    ):
        server = loop.call(lambda: Server(registry, access))
        address = loop.run(server.start("127.0.0.1", 0, credentials))
        own = (
            tls_channel(address, authority.root, client=authority.client(common_name=OWNER))
            if certificates
            else tls_channel(address, authority.root, token=OWNER_TOKEN)
        )
        with own:
            yield ClosedGround(
                where=_stepped(own, registry),
                address=address,
                authority=authority,
                provider=provider,
                certificates=certificates,
            )
        loop.run(server.stop(0))
        loop.run(registry.settle())


@contextmanager
def _disk() -> Iterator[Persistence]:
    with ThreadPoolExecutor(2) as executor:
        storage = LocalStorage(MemoryDisk(), HERE)
        yield Persistence(storage=storage, executor=executor, origin=HERE, replay_foreign=False)
        storage.close()


def _token_access(folder: Path, provider: Provider) -> Access:
    tokens = [(OWNER, OWNER_TOKEN), (NEIGHBOUR, NEIGHBOUR_TOKEN)]
    (folder / "jwks.json").write_text(provider.key_set("one"))
    issuer = IssuedTokens(
        keys=FileKeys(folder / "jwks.json"),
        issuer=ISSUER,
        audience=AUDIENCE,
        claim="claimed_tenant",
        leeway_s=LEEWAY_S,
    )
    return Access(tokens=Tokens(token_file(folder / "tokens.toml", tokens)), issuer=issuer)


def _stepped(channel: grpc.Channel, registry: SessionRegistry) -> Ground:
    driver = ChannelDriver(channel)
    session_id = driver.create(rich_spec(), model()).status.session_id
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
    Checkpoints(driver).save(session_id, CHECKPOINT)
    return Ground(driver=driver, channel=channel, registry=registry, session_id=session_id)


class ChannelDriver(StubDriver):
    """Speaks over a channel that somebody else has made, and will close."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__("")
        self.stub = OptimizerServiceStub(channel)


def request_for(message: Descriptor, session_id: str) -> Message:
    """Return the shortest request that names a session and a checkpoint, as far as it can."""
    request = GetMessageClass(message)()
    events = [
        getattr(request, field.name)
        for field in message.fields
        if field.containing_oneof and field.message_type
    ]
    for part in (request, *events):
        if "session_id" in part.DESCRIPTOR.fields_by_name:
            part.session_id = session_id
        if "name" in part.DESCRIPTOR.fields_by_name:
            part.name = CHECKPOINT
    return request


def reason_of(
    channel: grpc.Channel, method: MethodDescriptor, request: Message, *, service: str = ""
) -> str:
    """Call any method with one request; return why it is refused, or OK."""
    try:
        call(channel, method, request, service=service)
    except RefusedError as error:
        return error.reason
    return "OK"


def call(
    channel: grpc.Channel,
    method: MethodDescriptor,
    request: Message,
    *,
    service: str = "",
    metadata: tuple[tuple[str, str], ...] = (),
) -> Message:
    """Call any method with one request, and return its first answer.

    Raises:
        RefusedError: It has none.
    """
    kind: Any = [
        [channel.unary_unary, channel.unary_stream],
        [channel.stream_unary, channel.stream_stream],
    ][method.client_streaming][method.server_streaming]
    ask = kind(
        f"/{service or method.containing_service.full_name}/{method.name}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    argument = iter([request]) if method.client_streaming else request
    try:
        answer = ask(argument, timeout=TIMEOUT_S, metadata=metadata)
        first: Message = next(answer) if method.server_streaming else answer
    except grpc.RpcError as error:
        raise RefusedError.from_call(error) from error
    if method.server_streaming:
        answer.cancel()
    return first
