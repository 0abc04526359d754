"""Every limit holds: one more is refused with what to do, and takes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import grpc
import pytest
import torch
from drivers import take
from event_loop import TIMEOUT_S
from faults.ground import STEPS, Ground, Mistakes, ground, rich_spec
from faults.spec_changes import Change, group, grouped, many_parameters, named, scheduled, shaped
from refusals import RefusedError, refused
from scenarios.models import gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.scheduler_pb2 import LambdaLR, MultiStepLR
from optserve.v1.session_pb2 import Split
from optserve_server.config import Config
from optserve_server.core.admission import Spare
from optserve_server.core.limits import Limits

Act = Callable[[Ground], object]

LARGE = torch.zeros(100_000)  # 400 KB


def _created(change: Change) -> Act:
    def act(where: Ground) -> None:
        wanted = rich_spec()
        change(wanted)
        where.driver.create(wanted)

    return act


def _one_stream_more(where: Ground) -> None:
    with where.driver.worker(where.session_id):
        where.driver.download(where.session_id)


def _evaluated(where: Ground) -> None:
    where.driver.evaluate(where.session_id, LARGE[None], torch.tensor([0]), split=Split.SPLIT_TRAIN)


def _stepped_with_a_long_digest(where: Ground) -> None:
    with where.driver.worker(where.session_id) as worker:
        take(worker, STEPS + 1, gradients(1), bytes(17))


def _sent_in_one_chunk(where: Ground) -> None:
    values = {"w": torch.zeros(100)}
    session_id = where.driver.create(spec(SGD(), parameters=values)).status.session_id
    try:
        where.driver.upload(session_id, values)
    finally:
        where.driver.delete(session_id)


LIMITS: dict[str, tuple[Limits, Act, str, str]] = {
    "sessions_max": (Limits(sessions_max=1), _created(lambda _: None), "TOO_MANY", ""),
    "streams_max": (Limits(streams_max=1), _one_stream_more, "TOO_MANY", ""),
    "tenant_sessions_max": (
        Limits(tenant_sessions_max=1),
        _created(lambda _: None),
        "TOO_MANY",
        "",
    ),
    "tenant_bytes_max": (
        Limits(tenant_bytes_max=400_000),
        _created(shaped(LARGE.numel())),
        "MEMORY_EXHAUSTED",
        "spec.parameters",
    ),
    "tenant_bytes_max for an evaluation": (
        Limits(tenant_bytes_max=400_000),
        _evaluated,
        "MEMORY_EXHAUSTED",
        "predictions",
    ),
    "memory_bytes_max": (
        Limits(memory_bytes_max=400_000),
        _created(shaped(LARGE.numel())),
        "MEMORY_EXHAUSTED",
        "spec.parameters",
    ),
    "memory_bytes_max for an evaluation": (
        Limits(memory_bytes_max=400_000),
        _evaluated,
        "MEMORY_EXHAUSTED",
        "predictions",
    ),
    "session_bytes_max": (
        Limits(session_bytes_max=400_000),
        _created(shaped(LARGE.numel())),
        "LIMIT_EXCEEDED",
        "spec.parameters",
    ),
    "loss_bytes_max": (
        Limits(loss_bytes_max=399_999),
        _evaluated,
        "LIMIT_EXCEEDED",
        "predictions",
    ),
    "chunk_bytes_max": (
        Limits(chunk_bytes_max=399),
        _sent_in_one_chunk,
        "LIMIT_EXCEEDED",
        "chunks",
    ),
    "parameters_max": (
        Limits(parameters_max=2),
        _created(many_parameters(3)),
        "LIMIT_EXCEEDED",
        "spec.parameters",
    ),
    "groups_max": (
        Limits(groups_max=1),
        _created(grouped(group("a", "b"), group("default"))),
        "LIMIT_EXCEEDED",
        "spec.groups",
    ),
    "workers_max": (
        Limits(workers_max=2),
        _created(lambda s: setattr(s, "workers", 3)),
        "LIMIT_EXCEEDED",
        "spec.workers",
    ),
    "dimensions_max": (
        Limits(dimensions_max=2),
        _created(shaped(1, 1, 1)),
        "LIMIT_EXCEEDED",
        "spec.parameters[0].shape",
    ),
    "elements_max": (
        Limits(elements_max=2),
        _created(scheduled(MultiStepLR(milestones=[1, 2, 3]))),
        "LIMIT_EXCEEDED",
        "spec.scheduler.multi_step_lr.milestones",
    ),
    "name_bytes_max": (
        Limits(name_bytes_max=7),
        _created(named("12345678")),
        "LIMIT_EXCEEDED",
        "spec.parameters[0].name",
    ),
    "expression_chars_max": (
        Limits(expression_chars_max=5),
        _created(scheduled(LambdaLR(lr_lambda="1 + 23"))),
        "INVALID_EXPRESSION",
        "spec.scheduler.lambda_lr.lr_lambda",
    ),
    "expression_nodes_max": (
        Limits(expression_nodes_max=3),
        _created(scheduled(LambdaLR(lr_lambda="-1 + 2"))),
        "INVALID_EXPRESSION",
        "spec.scheduler.lambda_lr.lr_lambda",
    ),
    "loss_points_max": (
        Limits(loss_points_max=2),
        _created(lambda s: setattr(s.limits, "loss_points_max", 3)),
        "LIMIT_EXCEEDED",
        "spec.limits.loss_points_max",
    ),
    "round_timeout_s": (
        Limits(round_timeout_s=1),
        _created(lambda s: setattr(s.limits, "round_timeout_s", 1.5)),
        "LIMIT_EXCEEDED",
        "spec.limits.round_timeout_s",
    ),
    "digest_bytes_max": (
        Limits(digest_bytes_max=16),
        _stepped_with_a_long_digest,
        "LIMIT_EXCEEDED",
        "digest",
    ),
    "request_id_bytes_max": (
        Limits(request_id_bytes_max=16),
        lambda where: where.driver.create(rich_spec(), request_id="ä" * 8 + "!"),
        "LIMIT_EXCEEDED",
        "request_id",
    ),
}


@pytest.mark.parametrize(("limits", "act", "reason", "field"), LIMITS.values(), ids=LIMITS)
def test_what_is_beyond_a_limit_is_refused_and_takes_nothing(
    limits: Limits, act: Act, reason: str, field: str
) -> None:
    with ground(limits) as where, Mistakes(where).refused(reason, field):
        act(where)


def test_a_message_beyond_its_limit_is_refused_by_grpc_itself() -> None:
    with ground(Limits(message_bytes_max=200_000, chunk_bytes_max=50_000)) as where:
        before = where.look()
        with pytest.raises(RefusedError) as caught:
            where.driver.evaluate(where.session_id, LARGE[None], torch.tensor([0]))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert where.look() == before


def test_what_is_within_the_limits_is_taken() -> None:
    limits = Limits(
        sessions_max=2,
        parameters_max=2,
        groups_max=1,
        workers_max=2,
        dimensions_max=2,
        elements_max=2,
        name_bytes_max=4,
        expression_chars_max=5,
        expression_nodes_max=3,
        loss_points_max=2,
    )
    wanted = spec(SGD(), groups=[group("bias", "b")], workers=2)
    scheduled(LambdaLR(lr_lambda="1 + 2"))(wanted)
    with ground(limits) as where:
        assert where.driver.create(wanted).spec.limits.loss_points_max == 2


def test_a_limit_that_a_client_may_ask_for_again_says_when() -> None:
    with ground(Limits(sessions_max=1)) as where:
        with pytest.raises(RefusedError) as caught:
            where.driver.create(rich_spec())
        assert caught.value.retry_after_s is not None
        where.driver.delete(where.session_id)
        where.driver.create(rich_spec())


def test_memory_is_given_back_with_the_session() -> None:
    with ground() as where:
        before = where.look()
        session = where.driver.create(rich_spec())
        reserved = where.registry.budget.reserved_bytes - before.reserved_bytes
        assert reserved == session.status.reserved_bytes > 0
        where.driver.delete(session.status.session_id)
        assert where.look() == before


@pytest.mark.parametrize("limit", ["memory_bytes_max", "tenant_bytes_max"])
def test_a_session_that_takes_all_the_memory_can_be_given_its_values(limit: str) -> None:
    values = {"w": LARGE, "b": LARGE}
    wanted = spec(SGD(lr=1), parameters=values)
    with ground() as asked:
        enough = asked.look().reserved_bytes + asked.driver.create(wanted).status.reserved_bytes
    with ground(Limits(**{limit: enough})) as where:
        session_id = where.driver.create(wanted).status.session_id
        # In the room of its gradients, of which none can come yet.
        for name, value in values.items():
            where.driver.upload(session_id, {name: value})
        with where.driver.worker(session_id) as worker:
            take(worker, 1, values)
        with Mistakes(where).refused("MEMORY_EXHAUSTED", "begin.parameters"):
            where.driver.upload(session_id, values)


def test_only_one_upload_at_a_time_has_the_room_of_the_gradients() -> None:
    spare = Spare()
    with spare.lent(idle=True) as first, spare.lent(idle=True) as second:
        assert (first, second) == (True, False)
    with spare.lent(idle=False) as not_idle:
        assert not not_idle
    with spare.lent(idle=True) as again:
        assert again


def test_a_momentum_that_no_memory_is_left_for_is_refused() -> None:
    wanted = spec(SGD(lr=1), parameters={"w": LARGE})
    with ground() as asked:
        enough = asked.look().reserved_bytes + asked.driver.create(wanted).status.reserved_bytes
    with ground(Limits(memory_bytes_max=enough)) as where:
        session_id = where.driver.create(wanted).status.session_id
        change = pb.UpdateSessionRequest(session_id=session_id)
        change.optimizer.sgd.momentum = 0.5
        before = where.driver.get(session_id)
        with Mistakes(where).refused("MEMORY_EXHAUSTED", "optimizer"):
            where.driver.update(change)
        assert where.driver.get(session_id) == before


def test_a_point_of_the_history_that_no_memory_is_left_for_is_refused() -> None:
    logits, classes = torch.eye(4), torch.arange(4)
    with ground() as where:
        budget = where.registry.budget
        free = where.registry.limits.memory_bytes_max - budget.reserved_bytes
        budget.reserve(free - 1000, what="a test", field="")  # Enough for the evaluation.
        with Mistakes(where).refused("MEMORY_EXHAUSTED", "split"):
            where.driver.evaluate(where.session_id, logits, classes, split=Split.SPLIT_TRAIN)
        where.driver.evaluate(where.session_id, logits, classes)


def test_a_download_keeps_to_the_size_of_chunks() -> None:
    values = {"w": torch.zeros(100)}
    with ground(Limits(chunk_bytes_max=160)) as where:
        session = where.driver.create(spec(SGD(), parameters=values), values)
        request = pb.DownloadParametersRequest(session_id=session.status.session_id)
        responses = list(where.driver.stub.DownloadParameters(request, timeout=TIMEOUT_S))
        sizes = [
            sum(len(chunk.data) for chunk in response.chunks.chunks) for response in responses[1:]
        ]
        assert sizes == [160, 160, 80]


def test_a_round_that_is_not_complete_in_the_server_s_time_is_refused() -> None:
    with ground(Limits(round_timeout_s=0.1)) as where:
        session = where.driver.create(spec(SGD(), workers=2), model())
        with where.driver.worker(session.status.session_id) as worker, refused("ROUND_TIMEOUT"):
            take(worker, 1, gradients(1))


def test_every_limit_is_tested_announced_and_can_be_set() -> None:
    elsewhere = {
        "message_bytes_max": test_a_message_beyond_its_limit_is_refused_by_grpc_itself,
        "stall_timeout_s": "test_stalls.py",
        "transfer_rate_min": "test_slow_readers.py",
        "calls_max": "test_too_many_calls.py",
        "request_rate_max": "test_too_many_calls.py",
        "idle_timeout_s": "test_idle_sessions.py",
        "journal_bytes_max": "test_durability.py",
        "checkpoints_max": "test_bad_checkpoints.py",
        "tenant_disk_bytes_max": "test_disk_quotas.py",
        "park_timeout_s": "test_parking.py",
    }
    tested = {name.partition(" ")[0] for name in LIMITS} | set(elsewhere)
    assert tested == {field.name for field in dataclasses.fields(Limits)}
    assert tested == {field.name for field in pb.Limits.DESCRIPTOR.fields}
    assert tested <= set(Config.model_fields)
