"""Keys of an identity provider: fetched when they are needed, and not when strangers like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from faults.strangers import AUDIENCE, ISSUER, OWNER, Provider

from optserve_server.core.errors import UnauthenticatedError
from optserve_server.rpc import issued
from optserve_server.rpc.issued import FetchedKeys, IssuedTokens, Keys, keys_at
from optserve_server.rpc.watched import UnusableFileError


class KeyServer(ThreadingHTTPServer):
    """Publishes a key set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key_set = ""
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/keys"


class _Handler(BaseHTTPRequestHandler):
    server: KeyServer

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200 if self.server.key_set else 503)
        self.end_headers()
        self.wfile.write(self.server.key_set.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def publisher() -> Iterator[KeyServer]:
    with KeyServer() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def provider() -> Provider:
    return Provider()


def _tokens(keys: Keys) -> IssuedTokens:
    return IssuedTokens(
        keys=keys, issuer=ISSUER, audience=AUDIENCE, claim="claimed_tenant", leeway_s=5
    )


def test_keys_are_fetched_once_for_all_who_come(publisher: KeyServer, provider: Provider) -> None:
    publisher.key_set = provider.key_set("one")

    async def ask() -> list[str]:
        tokens = _tokens(FetchedKeys(publisher.url))
        first = await asyncio.gather(*[tokens.caller(provider.token()) for _ in range(20)])
        return [each.tenant for each in (*first, await tokens.caller(provider.token("bob")))]

    assert publisher.asked == 0
    assert asyncio.run(ask()) == [OWNER] * 20 + ["bob"]
    assert publisher.asked == 1


def test_a_key_that_is_new_is_fetched_but_not_as_often_as_strangers_ask(
    publisher: KeyServer, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.key_set = provider.key_set("one")

    async def ask() -> None:
        tokens = _tokens(FetchedKeys(publisher.url))
        assert (await tokens.caller(provider.token())).tenant == OWNER
        publisher.key_set = provider.key_set("one", "two")
        for number in range(20):
            with pytest.raises(UnauthenticatedError):
                await tokens.caller(provider.token(key_id=f"invented-{number}"))
        assert publisher.asked == 1
        monkeypatch.setattr(issued, "_COOLDOWN_S", 0.0)
        assert (await tokens.caller(provider.token(key_id="two"))).tenant == OWNER
        assert publisher.asked == 2

    asyncio.run(ask())


def test_keys_stay_in_force_while_the_issuer_does_not_answer(
    publisher: KeyServer,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publisher.key_set = provider.key_set("one")
    monkeypatch.setattr(issued, "_COOLDOWN_S", 0.0)

    async def ask() -> None:
        tokens = _tokens(FetchedKeys(publisher.url))
        assert (await tokens.caller(provider.token())).tenant == OWNER
        publisher.key_set = ""
        monkeypatch.setattr(issued, "_LIFESPAN_S", 0.0)
        while publisher.asked < 3:
            assert (await tokens.caller(provider.token())).tenant == OWNER
            await asyncio.sleep(0.001)
        assert (await tokens.caller(provider.token())).tenant == OWNER

    asyncio.run(ask())
    assert "cannot be fetched" in caplog.text


def test_a_key_that_the_issuer_takes_back_is_forgotten(
    publisher: KeyServer, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.key_set = provider.key_set("one")
    monkeypatch.setattr(issued, "_COOLDOWN_S", 0.0)

    async def ask() -> None:
        tokens = _tokens(FetchedKeys(publisher.url))
        assert (await tokens.caller(provider.token())).tenant == OWNER
        publisher.key_set = provider.key_set("two")
        monkeypatch.setattr(issued, "_LIFESPAN_S", 0.0)
        while True:  # Whoever comes first has new keys fetched, and is let in.
            assert (await tokens.caller(provider.token())).tenant == OWNER
            await asyncio.sleep(0.001)

    with pytest.raises(UnauthenticatedError):
        asyncio.run(ask())


def test_without_keys_a_caller_is_told_when_to_come_again(
    publisher: KeyServer, provider: Provider
) -> None:
    async def ask() -> None:
        await _tokens(FetchedKeys(publisher.url)).caller(provider.token())

    with pytest.raises(UnauthenticatedError, match="its issuer does not answer") as caught:
        asyncio.run(ask())
    assert caught.value.retry_after_s


def test_a_token_that_names_no_key_is_signed_with_the_only_one(
    provider: Provider, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"

    def tenant(*names: str) -> str:
        path.write_text(provider.key_set(*names))
        return asyncio.run(_tokens(keys_at(str(path))).caller(provider.token(key_id=""))).tenant

    assert tenant("one") == OWNER
    with pytest.raises(UnauthenticatedError):
        tenant("one", "two")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"keys": []}', '{"keys": [3]}'])
def test_a_file_that_holds_no_key_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(UnusableFileError, match="no JSON Web Key Set"):
        keys_at(str(path))


def test_a_key_for_something_else_than_signatures_is_none(
    provider: Provider, tmp_path: Path
) -> None:
    key_set = json.loads(provider.key_set("one"))
    key_set["keys"][0]["use"] = "enc"
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(key_set))
    with pytest.raises(UnauthenticatedError):
        asyncio.run(_tokens(keys_at(str(path))).caller(provider.token()))
