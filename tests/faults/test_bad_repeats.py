"""Steps that come again, and do not say what they said the first time; in every form of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from event_loop import TIMEOUT_S
from faults.framing import B_BYTES, W_BYTES
from faults.ground import STEPS, Ground, Mistakes, ground
from messages import chunks_of, messages_of
from refusals import refused, translated
from scenarios.models import gradients, model
from streams import Answer, RawStream, raw_stream

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import Tensor, TensorChunks

STEP = STEPS + 1
DIGEST, OTHER = b"d" * 32, b"o" * 32
CHUNKS: Sequence[TensorChunks] = list(chunks_of(gradients(STEP).values()))

Send = Callable[[RawStream, bytes], None]


@pytest.fixture
def mistakes() -> Iterator[Mistakes]:
    """Make mistakes on ground of one's own: these sessions step."""
    with ground() as where:
        yield Mistakes(where)


def _with_begin(stream: RawStream, digest: bytes) -> None:
    stream.begin(STEP, digest)
    stream.chunks(CHUNKS)
    stream.end()


def _with_end(stream: RawStream, digest: bytes) -> None:
    stream.begin(STEP)
    stream.chunks(CHUNKS)
    stream.end(digest)


def _with_both(stream: RawStream, digest: bytes) -> None:
    stream.begin(STEP, digest)
    stream.chunks(CHUNKS)
    stream.end(digest)


def _announced(stream: RawStream, digest: bytes) -> None:
    headers = [message.header for message in messages_of(gradients(STEP))]
    stream.send(begin=pb.StepBegin(step=STEP, gradients=headers, digest=digest))
    stream.chunks(CHUNKS)
    stream.end()


FORMS: dict[str, Send] = {
    "begin": _with_begin,
    "end": _with_end,
    "both": _with_both,
    "announced": _announced,
}


def _packed(where: Ground, digest: bytes) -> pb.StepResult:
    """Take a packed step, or raise what it is refused with."""
    packed = pb.PackedStep(step=STEP, gradients=[W_BYTES, B_BYTES], digest=digest)
    with raw_stream(where.driver, where.session_id) as stream:
        stream.send(packed=packed)
        response = stream.receive()
        if response.HasField("packed"):
            return response.packed.result
        answer = Answer()
        answer.take(response)
        raise _refusal(answer)


def _unary(where: Ground, digest: bytes, *, asks: bool = False) -> pb.StepResult:
    """Take a step in one message, or ask for it without its bytes."""
    sent = messages_of(gradients(STEP))
    if asks:
        sent = [Tensor(header=message.header) for message in sent]
    request = pb.StepRequest(session_id=where.session_id, step=STEP, gradients=sent, digest=digest)
    with translated():
        return where.driver.stub.Step(request, timeout=TIMEOUT_S).result


def _streamed(send: Send) -> Callable[[Ground, bytes], pb.StepResult]:
    def streamed(where: Ground, digest: bytes) -> pb.StepResult:
        with raw_stream(where.driver, where.session_id) as stream:
            send(stream, digest)
            return _result(stream.answer())

    return streamed


def _result(answer: Answer) -> pb.StepResult:
    if answer.refusal:
        raise answer.refusal
    assert answer.result is not None
    return answer.result


def _refusal(answer: Answer) -> Exception:
    assert answer.refusal is not None
    return answer.refusal


WAYS: dict[str, Callable[[Ground, bytes], pb.StepResult]] = {
    **{name: _streamed(send) for name, send in FORMS.items()},
    "packed": _packed,
    "one-message": _unary,
}


@pytest.mark.parametrize("again", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("first", WAYS.values(), ids=WAYS)
def test_a_step_may_come_again_in_any_form_but_not_with_another_digest(
    mistakes: Mistakes,
    first: Callable[[Ground, bytes], pb.StepResult],
    again: Callable[[Ground, bytes], pb.StepResult],
) -> None:
    where = mistakes.ground
    assert not first(where, DIGEST).replayed
    with mistakes.refused("STEP_CONFLICT", "digest"):
        again(where, OTHER)
    before = where.look()
    assert again(where, DIGEST).replayed
    assert again(where, b"").replayed
    assert where.look() == before


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_digest_that_is_too_long_is_refused_in_every_form(
    mistakes: Mistakes, way: Callable[[Ground, bytes], pb.StepResult]
) -> None:
    with mistakes.refused("LIMIT_EXCEEDED", "digest"):
        way(mistakes.ground, bytes(33))
    assert way(mistakes.ground, bytes(32)).step == STEP


@pytest.mark.parametrize("applied", [False, True], ids=["new", "repeated"])
def test_a_step_ends_with_the_digest_that_it_began_with(mistakes: Mistakes, applied: bool) -> None:
    if applied:
        _unary(mistakes.ground, DIGEST)
    with (
        mistakes.refused("INVALID_FIELD", "digest"),
        raw_stream(mistakes.ground.driver, mistakes.ground.session_id) as stream,
    ):
        stream.begin(STEP, DIGEST)
        stream.chunks(CHUNKS)
        stream.end(OTHER)
        _result(stream.answer())


def test_the_chunks_of_a_repeat_may_be_left_out(mistakes: Mistakes) -> None:
    where = mistakes.ground
    _unary(where, DIGEST)
    before = where.look()
    with raw_stream(where.driver, where.session_id) as stream:
        stream.begin(STEP, DIGEST)
        stream.end()
        answer = stream.answer()
        assert _result(answer).replayed
        assert list(answer.parameters.values()) == list(before.parameters.values())
        stream.begin(STEP, DIGEST)
        stream.chunks(CHUNKS[:1])
        stream.chunks(CHUNKS[:1])  # Nobody looks at them.
        stream.end()
        assert _result(stream.answer()).replayed
    assert where.look() == before


def test_the_chunks_of_a_step_that_the_server_does_not_have_may_not_be_left_out(
    mistakes: Mistakes,
) -> None:
    with (
        mistakes.refused("BYTE_COUNT_MISMATCH", "gradients[0]"),
        raw_stream(mistakes.ground.driver, mistakes.ground.session_id) as stream,
    ):
        stream.begin(STEP, DIGEST)
        stream.end()
        _result(stream.answer())


def test_the_bytes_of_a_repeat_in_one_message_may_be_left_out(mistakes: Mistakes) -> None:
    where = mistakes.ground
    with mistakes.refused("BYTE_COUNT_MISMATCH", "gradients[0].data"):
        _unary(where, DIGEST, asks=True)
    _unary(where, DIGEST)
    before = where.look()
    assert _unary(where, DIGEST, asks=True).replayed
    assert where.look() == before


def test_a_conflict_is_told_at_the_beginning_and_the_stream_goes_on(mistakes: Mistakes) -> None:
    where = mistakes.ground
    _unary(where, DIGEST)
    with raw_stream(where.driver, where.session_id) as stream:
        stream.begin(STEP, OTHER)
        answer = stream.answer()  # Nothing of the content has been sent.
        assert answer.refusal is not None
        assert answer.refusal.reason == "STEP_CONFLICT"
        stream.chunks(CHUNKS)  # It may have been on its way: it is ignored.
        stream.end()
        assert _result(stream.step(STEP + 1, list(gradients(2).values()))).step == STEP + 1


@pytest.mark.parametrize("client_id", [b"short", bytes(15), bytes(17), bytes(1 << 20)], ids=len)
def test_a_client_s_id_has_sixteen_bytes_or_none(mistakes: Mistakes, client_id: bytes) -> None:
    with (
        mistakes.refused("INVALID_FIELD", "open.client_id"),
        raw_stream(mistakes.ground.driver, mistakes.ground.session_id, client_id),
    ):
        pass


def test_a_step_that_was_begun_and_not_ended_is_given_up_with_its_seat(mistakes: Mistakes) -> None:
    where, client_id = mistakes.ground, b"c" * 16
    before = where.look()
    with raw_stream(where.driver, where.session_id, client_id) as old:
        old.begin(STEP, DIGEST)
        old.chunks(CHUNKS)
        with raw_stream(where.driver, where.session_id, client_id) as new:
            assert new.opened.contribution == pb.Contribution(step=STEPS, applied=True)
            with refused("SEAT_TAKEN_OVER", field="worker"):
                old.answer()
            assert where.look() == before
            assert not _result(new.step(STEP, list(gradients(7).values()))).replayed


def test_a_request_s_id_that_is_too_long_is_refused(mistakes: Mistakes) -> None:
    driver = mistakes.ground.driver
    wanted = driver.get(mistakes.ground.session_id).spec
    for request_id in ("x" * 65, "ä" * 33):
        with mistakes.refused("LIMIT_EXCEEDED", "request_id"):
            driver.create(wanted, model(), request_id)
    session = driver.create(wanted, model(), "ä" * 32)
    driver.delete(session.status.session_id)
