"""What the catalogue says of a session, so that it can be listed, and found again, from disk."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from optserve_server.core.creations import CreationRequest
from optserve_server.core.events import SessionOpened
from optserve_server.core.spec_json import Read
from optserve_server.core.standing import Standing, State, decode_standing, encode_standing
from optserve_server.core.storage import Json, StoredSession
from optserve_server.core.tenant import DEFAULT_TENANT

VERSION = 1
"""Of the facts. A later version adds what an older reader must not pass over by a new number."""


def catalogue_facts(
    tenant: str, request: CreationRequest | None, standing: Standing
) -> Mapping[str, Json]:
    """Return what the catalogue is to say of a session."""
    return {
        "version": VERSION,
        "tenant": tenant,
        "request": {"id": request.request_id, "digest": request.digest.hex()} if request else None,
        "standing": encode_standing(standing),
    }


class ParkedSession:
    """A session that lies on disk only."""

    def __init__(self, stored: StoredSession, monotonic: Callable[[], float]) -> None:
        """Read what the catalogue says of a session that is parked now.

        Args:
            stored: In the catalogue.
            monotonic: See Surroundings.
        """
        self._monotonic = monotonic
        self._parked_s = monotonic()
        self.damaged = False
        """Whether what is on disk is not what was written there."""
        self.is_newer = False
        """Whether a newer server wrote it, which alone can bring it back."""
        self.request: CreationRequest | None = None
        """What has made it."""
        self._session_id = stored.session_id
        self._move: asyncio.Task[None] | None = None
        tenant = DEFAULT_TENANT
        try:
            facts: Read = stored.facts
            self.is_newer = facts["version"] > VERSION
            tenant = str(facts["tenant"])
            if request := facts["request"]:
                self.request = CreationRequest(
                    tenant=tenant,
                    request_id=str(request["id"]),
                    digest=bytes.fromhex(request["digest"]),
                )
            self._standing = decode_standing(facts["standing"], stored.session_id, State.PARKED)
        except (LookupError, TypeError, ValueError):
            self.damaged = not self.is_newer
            self._standing = _unknown(stored.session_id)
        self.opened = SessionOpened(
            session_id=stored.session_id, tenant=tenant, optimizer=self._standing.optimizer
        )

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self._session_id

    def idle_s(self) -> float:
        """Return for how long it has been parked."""
        return self._monotonic() - self._parked_s

    @property
    def is_moving(self) -> bool:
        """Whether it is on its way, to the disk or back."""
        return self._move is not None and not self._move.done()

    async def moved(self, move: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait until it has been moved: by what is on its way with it, else by ``move``.

        No call can cancel that; several wait for one. Raises what the move raises.
        """
        if self._move is None or self._move.done():
            self._move = asyncio.create_task(move())
            self._move.add_done_callback(_look_at)
        await asyncio.shield(self._move)

    async def stay(self) -> None:
        """Wait until it is no longer on its way."""
        if self._move:
            await asyncio.wait([self._move])

    def standing(self) -> Standing:
        """Return where it stands, as far as its last snapshot says."""
        state = State.DAMAGED if self.damaged else State.PARKED
        return dataclasses.replace(self._standing, state=state)


def _look_at(move: asyncio.Task[None]) -> None:
    """Look at how it ended, so that asyncio does not complain when everybody has gone."""
    if not move.cancelled():
        move.exception()


def _unknown(session_id: str) -> Standing:
    """Return what can be said of a session whose facts cannot be read."""
    return Standing(
        session_id=session_id,
        display_name="",
        state=State.DAMAGED,
        steps=0,
        epochs=0,
        rates={},
        optimizer="",
        workers=0,
        parameter_count=0,
        reserved_bytes=0,
        device="",
        created_s=0.0,
        stepped_s=None,
        durable_steps=0,
    )
