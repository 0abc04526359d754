"""Every rpc in any order, as chance has it, beside a model of a few pages that does the same."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
from faults.machines.frame import Effort, Report
from faults.machines.modelled.checkpoints import Checkpointing
from faults.machines.modelled.ends import Ends
from faults.machines.modelled.ground import OWNERS
from faults.machines.modelled.lives import WANTED, Lives
from faults.machines.modelled.session import Wanted
from faults.machines.modelled.steps import CONTENTS, Steps
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

_RULES = 30  # Of one example.
_ALL_FROM = 200  # So many examples call everything; fewer may leave something out.
_FRAMES_SHOWN = 4


class Rules(Lives, Steps, Checkpointing, Ends):
    """All rules, from sessions on that have stepped."""

    @initialize(
        begun=st.lists(
            st.tuples(WANTED, OWNERS, st.lists(CONTENTS, max_size=3)), min_size=1, max_size=3
        )
    )
    def begin(self, begun: list[tuple[Wanted, str, list[int | str]]]) -> None:
        for number, (wanted, owner, contents) in enumerate(begun):
            self.create(wanted, owner, "", with_values=True)
            self.train(number, contents, "packed")

    def teardown(self) -> None:
        """Let each session take one more step: it shows what an optimizer keeps, too."""
        try:
            for number in range(len(self.world.sessions)):
                self.train(number, [1], "packed")
        finally:
            super().teardown()


CALLED_BY: Mapping[str, Callable[..., None]] = {
    "CreateSession": Rules.create,
    "GetSession": Rules.look_at,
    "ListSessions": Rules.lists_are_what_they_must_be,
    "UpdateSession": Rules.update,
    "DeleteSession": Rules.delete,
    "UploadParameters": Rules.upload,
    "DownloadParameters": Rules.look_at,
    "Train": Rules.open,
    "Step": Rules.train,
    "GetContribution": Rules.ask,
    "EndEpoch": Rules.end_epoch,
    "EvaluateLoss": Rules.evaluate,
    "EvaluateLossStream": Rules.evaluate,
    "ListLossPoints": Rules.evaluate,
    "SaveCheckpoint": Rules.save,
    "ListCheckpoints": Rules.lists_are_what_they_must_be,
    "RestoreCheckpoint": Rules.restore,
    "DownloadCheckpoint": Rules.download,
    "DeleteCheckpoint": Rules.delete_a_checkpoint,
    "GetCatalogue": Rules.take_out_of_memory,
    "GetServerInfo": Rules.take_out_of_memory,
}
"""What calls each rpc, for one at least; many examples must show that it does."""


def compare(effort: Effort) -> Report:
    """Run examples, each of some tens of rules, until one shows a difference to the model."""

    @seed(effort.seed)
    class Seeded(Rules):
        calls: ClassVar[Counter[str]] = Counter()

        def teardown(self) -> None:
            super().teardown()
            effort.advance(1)

    failures: list[str] = []
    again = f"--only model --seed {effort.seed} --count {effort.count}"
    try:
        run_state_machine_as_test(
            Seeded,
            settings=settings(
                max_examples=effort.count,
                stateful_step_count=_RULES,
                database=None,
                deadline=None,
                # To make a failure short takes minutes.
                phases=[Phase.generate, *[Phase.shrink] * effort.thorough],
                suppress_health_check=list(HealthCheck),
            ),
        )
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - What was looked for.
        failures.append(f'{_told(error)}\n  again: make soak ARGS="{again}"')
    never = CALLED_BY.keys() - Seeded.calls.keys()
    if never and not failures and effort.count >= _ALL_FROM:
        failures.append(f"no rule has called {', '.join(sorted(never))}")
    return Report(
        tried=effort.count,
        notes=(f"{Seeded.calls.total():,} calls of {len(Seeded.calls)} rpcs",),
        failures=tuple(failures),
    )


def _told(error: BaseException) -> str:
    """Return what went wrong, and the rules that lead there, without the ways of hypothesis."""
    return "".join(traceback.format_exception(error, limit=-_FRAMES_SHOWN))
