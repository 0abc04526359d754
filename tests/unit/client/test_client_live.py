"""Both faces against a real server."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from faces import Connect
from server_process import ServerProcess

import optserve_client as optserve
from optserve_client import ClientConfig, TransferProgress, aio

SGD = optserve.optim.SGD(lr=0.5)
ONES = np.ones(3, np.float32)
LARGE = np.arange(3 << 20, dtype=np.float32)  # 12 MiB: more than a message, and not a whole number.


def test_a_numpy_loop_trains_a_classifier(client: optserve.Client) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=100)
    points = (rng.standard_normal((100, 2)) + 3 * labels[:, None]).astype(np.float32)
    with client.create_session(
        {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)},
        optimizer=optserve.optim.Adam(lr=0.1),
        scheduler=optserve.lr_scheduler.StepLR(step_size=10, gamma=0.5),
        loss=optserve.nn.CrossEntropyLoss(),
    ) as session:
        for number in range(1, 21):
            p = session.parameters
            loss = session.evaluate_loss(points @ p["w"] + p["b"], labels, split="train")
            result = session.step({"w": points.T @ loss.gradient, "b": loss.gradient.sum(0)})
            assert (result.step, session.steps) == (number, number)
        assert result.rates == {"default": 0.05}
        points_kept = session.loss_points("train", page_size=7)
        assert [point.steps for point in points_kept] == list(range(20))
        assert points_kept[-1].loss < points_kept[0].loss / 2
        assert (points_kept[-1].accuracy or 0) > 0.9
        assert len(session.loss_points("validation")) == 0


def test_tensors_larger_than_a_message_go_both_ways(client: optserve.Client) -> None:
    with client.create_session(
        {"large": LARGE, "small": ONES}, optimizer=SGD, loss=optserve.nn.MSELoss()
    ) as session:
        session.step({"large": LARGE, "small": ONES})
        assert np.array_equal(session.parameters["large"], LARGE - np.float32(0.5) * LARGE)
        assert session.parameters["small"].tolist() == [0.5] * 3
        loss = session.evaluate_loss(LARGE, np.zeros_like(LARGE), gradient=True)
        assert loss.gradient.shape == LARGE.shape
        downloaded = session.download()
        assert downloaded.steps == 1
        assert np.array_equal(downloaded["large"], session.parameters["large"])


def test_a_transfer_reports_its_progress(connect: Connect, server: ServerProcess) -> None:
    told: list[TransferProgress] = []
    with (
        connect(server.address, progress=told.append) as client,
        client.create_session({"large": LARGE}, optimizer=SGD) as session,
    ):
        session.download()
    for direction in ("upload", "download"):
        done = [each.done_bytes for each in told if each.direction == direction]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, LARGE.nbytes)
        assert len(done) > 10


def test_no_gradient_is_not_a_gradient_of_zeros(client: optserve.Client) -> None:
    adamw = optserve.optim.AdamW(lr=0.1, weight_decay=0.5)
    with client.create_session({"a": ONES, "b": ONES, "c": ONES}, optimizer=adamw) as session:
        session.step({"a": np.zeros_like(ONES), "b": None})
        assert (session.parameters["a"] < ONES).all()
        assert np.array_equal(session.parameters["b"], ONES)
        assert np.array_equal(session.parameters["c"], ONES)


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_a_refused_step_changes_nothing_and_the_next_one_is_taken(
    client: optserve.Client, via: optserve.Via
) -> None:
    with client.create_session({"w": ONES}, optimizer=SGD, via=via) as session:
        for gradient, refusal in (
            (np.full_like(ONES, np.nan), optserve.NonFiniteGradientError),
            (ONES.astype(np.float64), optserve.DataTypeMismatchError),
            (ONES[:2], optserve.ShapeMismatchError),
            (None, optserve.NoGradientError),
        ):
            with pytest.raises(refusal):
                session.step({"w": gradient})
        with pytest.raises(optserve.UnknownNameError, match="'v' is no parameter"):
            session.step({"v": ONES})
        assert np.array_equal(session.parameters["w"], ONES)
        assert session.step({"w": ONES}).step == 1


def test_a_repeated_step_is_answered_again_and_applied_once(client: optserve.Client) -> None:
    with client.create_session({"w": ONES}, optimizer=SGD) as session:
        session.step({"w": ONES})
        assert session.step({"w": ONES}, step=1).replayed
        assert session.parameters["w"].tolist() == [0.5] * 3
        with pytest.raises(optserve.StepOutOfOrderError) as refused:
            session.step({"w": ONES}, step=7)
        assert (refused.value.expected, session.steps) == ("2", 1)


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_a_repeated_step_with_other_content_is_a_conflict(
    connect: Connect, server: ServerProcess, via: optserve.Via
) -> None:
    with (
        connect(server.address, config=ClientConfig(lane="grpc")) as client,
        client.create_session({"w": ONES, "b": ONES}, optimizer=SGD, via=via) as session,
    ):
        session.step({"w": ONES})
        for others in ({"w": -ONES}, {"b": ONES}, {"w": ONES, "b": np.zeros_like(ONES)}):
            with pytest.raises(optserve.StepConflictError):
                session.step(others, step=1)
        assert session.step({"w": ONES}, step=1).replayed
        assert session.step({"w": -ONES}).step == 2


def test_values_taken_before_a_step_stay_as_they_are(client: optserve.Client) -> None:
    mine = ONES.copy()
    with client.create_session({"w": mine}, optimizer=SGD) as session:
        mine[:] = 7
        before = session.parameters["w"]
        session.step({"w": ONES})
        assert before.tolist() == [1.0] * 3
        with pytest.raises(ValueError, match="read-only"):
            session.parameters["w"][0] = 2


def test_a_session_changes_while_it_runs(client: optserve.Client) -> None:
    group = optserve.ParameterGroup(name="bias", parameters=["b"])
    with client.create_session({"w": ONES, "b": ONES}, optimizer=SGD, groups=[group]) as session:
        changed = session.update(
            optimizer=optserve.optim.SGD(lr=0.25),
            groups=[optserve.ParameterGroup(name="bias", overrides=optserve.optim.SGD(lr=1))],
            display_name="second thoughts",
        )
        assert {rate.group: rate.lr for rate in changed.status.rates} == {
            "default": 0.25,
            "bias": 1.0,
        }
        assert session.spec.display_name == "second thoughts"
        with pytest.raises(optserve.InvalidFieldError):
            session.update(optimizer=optserve.optim.Adam())


def test_epochs_are_counted_for_the_schedule(client: optserve.Client) -> None:
    with client.create_session(
        {"w": ONES},
        optimizer=SGD,
        scheduler=optserve.lr_scheduler.ExponentialLR(gamma=0.5),
        schedule_unit="epochs",
    ) as session:
        with pytest.raises(optserve.EpochEmptyError):
            session.end_epoch()
        session.step({"w": ONES})
        assert session.end_epoch().epochs == 1
        assert session.end_epoch(epoch=1).epochs == 1
        assert session.step({"w": ONES}).rates == {"default": 0.25}
        assert session.epochs == 1


def test_values_may_come_later(client: optserve.Client) -> None:
    later = optserve.Placeholder(shape=(3,), dtype=np.float32)
    with client.create_session({"w": later, "b": ONES}, optimizer=SGD) as session:
        with pytest.raises(optserve.ParametersNotSetError):
            session.parameters  # noqa: B018
        with pytest.raises(optserve.ParametersNotSetError):
            session.step({"w": ONES})
        session.upload({"w": 2 * ONES})
        assert session.parameters["w"].tolist() == [2.0] * 3
        assert session.step({"w": ONES}).step == 1


def test_two_workers_step_with_their_mean_gradient(
    client: optserve.Client, server: ServerProcess
) -> None:
    with client.create_session({"w": ONES}, optimizer=SGD, workers=2) as session:
        session_id = session.session_id
        with optserve.connect(server.address) as other_client, ThreadPoolExecutor() as threads:
            other = other_client.join_session(session_id, worker=1)
            pending = threads.submit(other.step, {"w": 3 * ONES})
            assert session.step({"w": ONES}).step == pending.result(30).step == 1
            assert session.parameters["w"].tolist() == [0.0] * 3
            assert np.array_equal(other.parameters["w"], session.parameters["w"])
            other.close()


def test_the_creators_block_deletes_the_session_and_a_joiners_does_not(
    client: optserve.Client,
) -> None:
    with client.create_session({"w": ONES}, optimizer=SGD) as session:
        with client.join_session(session.session_id) as joined:
            assert joined.parameters["w"].tolist() == [1.0] * 3
        assert client.get_session(session.session_id).status.steps == 0
    with pytest.raises(optserve.SessionNotFoundError):
        client.get_session(session.session_id)
    with pytest.raises(optserve.SessionNotFoundError):
        client.delete_session(session.session_id)


def test_what_goes_wrong_in_the_block_is_what_is_seen(client: optserve.Client) -> None:
    def lose_the_session_and_fail() -> None:
        with client.create_session({"w": ONES}, optimizer=SGD) as session:
            client.delete_session(session.session_id)
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        lose_the_session_and_fail()


def test_sessions_are_listed_over_pages(client: optserve.Client) -> None:
    made = [client.create_session({"w": ONES}, optimizer=SGD).session_id for _ in range(3)]
    listed = [status.session_id for status in client.list_sessions(page_size=2)]
    assert [each for each in listed if each in made] == made
    for session_id in made:
        client.delete_session(session_id)


def test_the_server_says_what_it_is_and_offers(client: optserve.Client) -> None:
    assert client.server_info().limits.chunk_bytes_max > 0
    assert "Adam" in [entry.name for entry in client.catalogue().optimizers]


def test_a_mistake_in_a_session_names_the_field(client: optserve.Client) -> None:
    with pytest.raises(optserve.InvalidHyperparameterError) as refused:
        client.create_session({"w": ONES}, optimizer=optserve.optim.SGD(lr=-1))
    assert refused.value.field == "spec.optimizer.sgd.lr"
    with pytest.raises(TypeError, match="optimiser"):
        client.create_session({"w": ONES}, optimiser=SGD)  # type: ignore[call-arg]


def test_unary_steps_of_a_large_model_are_refused_before_it_is_created(
    client: optserve.Client,
) -> None:
    before = len(list(client.list_sessions()))
    with pytest.raises(optserve.LimitError, match="via the stream"):
        client.create_session({"large": LARGE}, optimizer=SGD, via="unary")
    assert len(list(client.list_sessions())) == before


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_a_step_without_an_answer_in_time_may_be_taken_again(
    connect: Connect, server: ServerProcess, via: optserve.Via
) -> None:
    config = ClientConfig(step_timeout_s=0.3)
    with (
        connect(server.address, config=config) as client,
        client.create_session({"w": ONES}, optimizer=SGD, workers=2, via=via) as session,
    ):
        with pytest.raises(optserve.StepUnknownError, match=r"did not end within 0.3 s") as caught:
            session.step({"w": ONES})
        assert (caught.value.step, caught.value.code) == (1, "DEADLINE_EXCEEDED")
        assert session.status().steps == 0
        with optserve.connect(server.address) as other_client, ThreadPoolExecutor() as threads:
            other = other_client.join_session(session.session_id, worker=1)
            pending = threads.submit(other.step, {"w": ONES})
            while not pending.done():  # The server may still be busy with the step given up.
                try:
                    session.step({"w": ONES})
                except (optserve.WorkerBusyError, optserve.StepUnknownError):
                    continue
            assert pending.result().step == session.steps == 1
        assert session.parameters["w"].tolist() == [0.5] * 3


def test_what_is_closed_says_so_and_may_be_closed_again(
    connect: Connect, server: ServerProcess
) -> None:
    client = connect(server.address)
    session = client.create_session({"w": ONES}, optimizer=SGD)
    session.step({"w": ONES})
    session.close()
    session.close()
    with pytest.raises(optserve.ClosedError):
        session.step({"w": ONES})
    again = client.join_session(session.session_id)
    assert again.step({"w": ONES}).step == 2
    client.delete_session(session.session_id)
    client.close()
    client.close()
    with pytest.raises(optserve.ClosedError):
        client.server_info()


def test_closing_the_client_ends_a_step_of_another_thread(server: ServerProcess) -> None:
    with optserve.connect(server.address) as keeper:
        client = optserve.connect(server.address)
        session = client.create_session({"w": ONES}, optimizer=SGD, workers=2)
        session.open()
        timer = threading.Timer(0.3, client.close)
        timer.start()
        with pytest.raises(optserve.ClosedError):
            session.step({"w": ONES})
        timer.join()
        keeper.delete_session(session.session_id)


def test_closing_the_client_ends_a_step_of_another_task(server: ServerProcess) -> None:
    async def play() -> None:
        async with aio.connect(server.address) as keeper:
            client = await aio.connect(server.address)
            session = await client.create_session({"w": ONES}, optimizer=SGD, workers=2)
            for via in ("stream", "unary"):
                step = asyncio.create_task(session.step({"w": ONES}, via=via))
                await asyncio.sleep(0.2)
                if via == "stream":
                    step.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await step
            await client.close()
            with pytest.raises(optserve.ClosedError):
                await step
            await keeper.delete_session(session.session_id)

    asyncio.run(play())


def test_where_no_server_is_says_so(connect: Connect) -> None:
    with pytest.raises(optserve.UnavailableError) as refused:
        connect("127.0.0.1:1")
    assert "no optserve server answers at 127.0.0.1:1" in str(refused.value)
    assert "optserve-server" in str(refused.value)


def test_a_server_of_something_else_is_told_apart(connect: Connect) -> None:
    other = grpc.server(ThreadPoolExecutor(max_workers=1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(optserve.ProtocolError, match="it is no optserve"):
            connect(f"127.0.0.1:{port}")
    finally:
        other.stop(None).wait()


def test_a_server_that_says_nothing_is_given_up(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = ClientConfig(connect_timeout_s=0.5)
        with pytest.raises(optserve.UnavailableError, match="no optserve server answers"):
            connect(f"127.0.0.1:{silent.getsockname()[1]}", config=config)
