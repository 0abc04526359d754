"""What must come of a scenario: a checkpoint is what the acts before it make of a new session."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reference import ANSWERS, Session
from tensors import Json


class Recorded:
    """A session, and all that was done to it."""

    def __init__(self, spec: Json, *, effective: bool) -> None:
        """Make it; see Session."""
        self.session = Session(copy.deepcopy(spec), effective=effective)
        self._spec = spec
        self._effective = effective
        self._acts: list[Json] = []

    def play(self, act: Json) -> Json:
        """Play an act, and return what it answers."""
        self._acts.append(act)
        return ANSWERS[act["act"]](self.session, act)

    def again(self, display_name: str | None = None) -> Recorded:
        """Return another session that has come to the same state.

        Not a copy of this one: torch's schedulers hold on to the optimizer that they were made for.
        """
        named = {} if display_name is None else {"display_name": display_name}
        other = Recorded(self._spec | named, effective=self._effective)
        for act in self._acts:
            other.play(act)
        return other


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint, and the state that it holds."""

    name: str
    session: str
    """Label of the session that it was saved of."""
    state: Recorded

    @property
    def answer(self) -> Json:
        """What is said of it."""
        status = self.state.session.status
        counted = ("steps", "epochs", "optimizer", "parameter_count")
        return {"name": self.name} | {key: status[key] for key in counted}


@dataclass(slots=True, kw_only=True)
class Reference:
    """All the sessions and checkpoints of a scenario."""

    effective: bool
    sessions: dict[str, Recorded] = field(default_factory=dict)
    """By label."""
    saved: list[Saved] = field(default_factory=list)
    """The oldest first."""

    def answer(self, act: Json) -> Json:
        """Play an act, and return what it answers."""
        if own := _OF_SCENARIOS.get(act["act"]):
            return own(self, act)
        return self.sessions[act["session"]].play(act)

    def create(self, act: Json) -> Json:
        """Make a session."""
        created = Recorded(act["spec"], effective=self.effective)
        self.sessions[act["session"]] = created
        return created.session.describe(act)

    def list_sessions(self, _: Json) -> Json:
        """List the sessions that are there."""
        return {"sessions": [each.session.status for each in self.sessions.values()]}

    def delete_session(self, act: Json) -> Json:
        """Forget a session, and none of its checkpoints."""
        return self.sessions.pop(act["session"]).session.status

    def save(self, act: Json) -> Json:
        """Save a session; once more, where the author does not say that this is refused."""
        try:
            return self._find(act).answer
        except StopIteration:
            state = self.sessions[act["session"]].again()
            self.saved.append(Saved(name=act["name"], session=act["session"], state=state))
            return self.saved[-1].answer

    def list_saved(self, act: Json) -> Json:
        """List checkpoints, of one session or of all."""
        wanted = act.get("session")
        listed = [each.answer for each in self.saved if wanted in (None, each.session)]
        return {"checkpoints": listed}

    def restore(self, act: Json) -> Json:
        """Make a session that goes on from a checkpoint."""
        restored = self._find(act).state.again(act.get("display_name"))
        self.sessions[act["restored"]] = restored
        return restored.session.describe(act)

    def download(self, act: Json) -> Json:
        """Say what the file of a checkpoint holds."""
        found = self._find(act)
        return {"checkpoint": found.answer} | found.state.session.kept()

    def delete_saved(self, act: Json) -> Json:
        """Delete a checkpoint."""
        found = self._find(act)
        self.saved.remove(found)
        return found.answer

    def _find(self, act: Json) -> Saved:
        wanted = act["session"], act["name"]
        return next(each for each in self.saved if (each.session, each.name) == wanted)


_OF_SCENARIOS: Mapping[str, Callable[[Reference, Json], Json]] = {
    "create_session": Reference.create,
    "list_sessions": Reference.list_sessions,
    "delete_session": Reference.delete_session,
    "save_checkpoint": Reference.save,
    "list_checkpoints": Reference.list_saved,
    "restore_checkpoint": Reference.restore,
    "download_checkpoint": Reference.download,
    "delete_checkpoint": Reference.delete_saved,
}
"""What answers each act that is not one session's own."""
