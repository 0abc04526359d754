"""Steps whose tensors travel encoded: what a local loop does that rounds in the same places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from drivers import take
from drivers_grpc import StubDriver
from messages import headers_of
from numpy.typing import NDArray
from refusals import refused
from server_process import ServerProcess, running_server
from torch import Tensor, nn

import optserve_client as optserve
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.session_pb2 import SessionSpec
from optserve.v1.session_pb2 import Wire as WireMessage
from optserve.v1.tensor_pb2 import Encoding
from optserve_client import Client, ClientConfig, Session, Via, Wire, WireEncoding
from optserve_client.torch import RemoteOptimizer

Floats = NDArray[np.float32]

HALVES: dict[WireEncoding, torch.dtype] = {"BF16": torch.bfloat16, "FP16": torch.float16}
ENCODINGS: tuple[WireEncoding, ...] = ("BF16", "FP16", "INT8_BLOCKS")
SMALL = {"w": (40, 7), "scale": (), "empty": (0, 3), "b": (9,)}
LARGE = {"b": (9,), "w": (700, 1000), "tail": (300_001,)}  # Several messages of chunks.
FORMS = [
    pytest.param(SMALL, "stream", id="packed"),
    pytest.param(LARGE, "stream", id="chunks"),
    pytest.param(SMALL, "unary", id="unary"),
]


@pytest.fixture(scope="module")
def overlapping() -> Iterator[ServerProcess]:
    """Start a server that answers a step while its gradients arrive, wherever it can."""
    with running_server("--overlap", "on") as process:
        yield process


@pytest.fixture(scope="module", params=["server", "overlapping"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Connect to a real server."""
    chosen: ServerProcess = request.getfixturevalue(request.param)
    with optserve.connect(chosen.address, progress=False) as connected:
        yield connected


def values_of(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Floats]:
    """Return the same values each time."""
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(random.standard_normal(shape), np.float32)
        for name, shape in shapes.items()
    }


def gradient_at(parameters: dict[str, Floats], step: int) -> dict[str, Floats]:
    """Return a gradient that depends on the parameters, to the last bit."""
    noise = values_of({name: each.shape for name, each in parameters.items()}, 100 + step)
    return {
        name: np.asarray(noise[name] + each * np.float32(0.1)) for name, each in parameters.items()
    }


def newest(session: Session) -> dict[str, Floats]:
    """Return copies of the newest parameters."""
    return {name: each.copy() for name, each in session.parameters.items()}


def assert_same(one: dict[str, Floats], other: dict[str, Floats]) -> None:
    for name, values in one.items():
        assert np.array_equal(values.view(np.uint32), other[name].view(np.uint32)), name


@pytest.mark.parametrize("encoding", HALVES)
@pytest.mark.parametrize(("shapes", "via"), FORMS)
def test_halves_give_the_bits_of_a_local_loop_that_rounds(
    encoding: WireEncoding, shapes: dict[str, tuple[int, ...]], via: Via, client: Client
) -> None:
    def rounded(values: Tensor) -> Tensor:
        return values.to(HALVES[encoding]).float()

    own = {name: torch.from_numpy(each) for name, each in values_of(shapes, 1).items()}
    adam = torch.optim.Adam(own.values(), lr=0.01, fused=True)
    seen = values_of(shapes, 1)
    wire = Wire(gradients=encoding, parameters=encoding)
    with client.create_session(
        values_of(shapes, 1), optimizer=optserve.optim.Adam(lr=0.01), wire=wire, via=via
    ) as session:
        for step in range(1, 6):
            gradients = gradient_at(seen, step)
            session.step(gradients)
            for name, parameter in own.items():
                parameter.grad = rounded(torch.from_numpy(gradients[name]))
            adam.step()
            seen = {name: rounded(each).numpy() for name, each in own.items()}
            assert_same(newest(session), seen)
        exact = {name: each.numpy() for name, each in own.items()}
        assert_same(dict(session.download()), exact)


@pytest.mark.parametrize(("shapes", "via"), FORMS)
def test_int8_parameters_are_as_near_as_their_last_move_is_small(
    shapes: dict[str, tuple[int, ...]], via: Via, client: Client
) -> None:
    before = values_of(shapes, 1)
    with client.create_session(
        before, optimizer=optserve.optim.Adam(lr=0.01), wire=Wire(parameters="INT8_BLOCKS"), via=via
    ) as session:
        for step in range(1, 12):
            session.step(gradient_at(before, step))
            seen = newest(session)
            exact = dict(session.download())
            if step == 1 or via == "unary":
                assert_same(seen, exact)
            for name, each in exact.items():
                moved = np.abs(each - before[name]).max(initial=0)
                bound = moved / 127 / 2 * (1 + 2.0**-10) + 2.0**-22  # And what sums are rounded to.
                assert np.abs(seen[name] - each).max(initial=0) <= bound
            before = seen


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("shapes", "via"), FORMS[:2])
def test_a_step_that_is_refused_leaves_nothing_behind(
    encoding: WireEncoding, shapes: dict[str, tuple[int, ...]], via: Via, client: Client
) -> None:
    wire = Wire(gradients=encoding, parameters=encoding)
    last = list(shapes)[-1]  # Before it is there, much of the answer may have been sent.

    def run(*, disturbed: bool) -> dict[str, Floats]:
        with client.create_session(
            values_of(shapes, 1), optimizer=optserve.optim.Adam(lr=0.01), wire=wire, via=via
        ) as session:
            for step in range(1, 5):
                gradients = gradient_at(values_of(shapes, 1), step)
                if disturbed:
                    for bad in (np.nan, -np.inf):
                        broken = gradients | {last: gradients[last].copy()}
                        broken[last][-1] = bad
                        with pytest.raises(optserve.NonFiniteGradientError):
                            session.step(broken)
                assert not session.step(gradients).replayed
                seen, exact = newest(session), dict(session.download())
                for name, each in exact.items():
                    assert np.allclose(seen[name], each, rtol=2.0**-8, atol=1e-3)
                if disturbed:  # Nor does one that was applied before.
                    assert session.step(gradients, step=step).replayed
                    others = gradient_at(values_of(shapes, 1), 99)
                    with pytest.raises(optserve.StepConflictError):
                        session.step(others, step=step)
            return dict(session.download())

    assert_same(run(disturbed=True), run(disturbed=False))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_step_whose_answer_is_lost_is_taken_again_with_the_same_bytes(
    encoding: WireEncoding, server: ServerProcess
) -> None:
    wire = Wire(gradients=encoding, parameters=encoding)
    impatient = ClientConfig(step_timeout_s=0.4)

    def run(lost: Sequence[int]) -> dict[str, Floats]:
        options: Any = {"optimizer": optserve.optim.SGD(lr=0.1), "wire": wire, "workers": 2}
        with (
            optserve.connect(server.address, progress=False) as client,
            optserve.connect(server.address, config=impatient, progress=False) as hasty,
            client.create_session(values_of(SMALL, 1), **options) as other,
            ThreadPoolExecutor(1) as pool,
        ):
            session = hasty.join_session(other.session_id, worker=1)
            for step in range(1, 7):
                mine, others = (gradient_at(values_of(SMALL, 2), 2 * step + i) for i in range(2))
                if step in lost:
                    with pytest.raises(optserve.StepUnknownError):
                        session.step(mine)
                    assert other.step(others).step == step  # Its share had come before.
                    assert session.step(mine).replayed
                    if encoding == "INT8_BLOCKS":  # The stream is new: nothing is rounded.
                        assert_same(newest(session), dict(session.download()))
                else:
                    answer = pool.submit(other.step, others)
                    session.step(mine)
                    answer.result(10)
            return dict(other.download())

    assert_same(run(lost=[2, 5]), run(lost=[]))


def test_a_parameter_that_was_nan_is_right_again_after_an_upload(client: Client) -> None:
    with client.create_session(
        values_of(SMALL, 1),
        optimizer=optserve.optim.SGD(lr=1.0),
        wire=Wire(gradients="INT8_BLOCKS", parameters="INT8_BLOCKS"),
        allow_non_finite=True,
    ) as session:
        gradients = {"w": np.zeros((40, 7), np.float32)}
        session.step(gradients)
        session.step({"w": np.full((40, 7), np.inf, np.float32)})
        assert np.isnan(session.parameters["w"]).all()
        session.upload(values_of(SMALL, 3))
        session.step(gradients)
        assert_same(newest(session), values_of(SMALL, 3))
        gradient = values_of(SMALL, 4)["w"]
        session.step({"w": gradient})  # And no NaN has stayed in what is added to it.
        exact = values_of(SMALL, 3)["w"] - gradient
        rounded_away = np.abs(gradient).max() / 127  # Half a scale each way.
        assert np.abs(session.parameters["w"] - exact).max() < rounded_away * 1.01


class _Training:
    """A classifier of points in 20 dimensions, trained from the same beginning each time.

    Its activation is smooth: small differences stay small, on whatever machine.
    """

    STEPS = 60

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(7)
        self._inputs = torch.randn(2_000, 20, generator=random)
        self._targets = (self._inputs @ torch.randn(20, 6, generator=random)).argmax(1)

    def beginning(self) -> nn.Module:
        """Return the model before the first step."""
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 6))

    def run(self, client: Client, wire: Wire, *, forgetful: bool = False) -> tuple[Tensor, float]:
        """Train; return the parameters that the server has, and the last loss.

        Args:
            client: Of the server.
            wire: How tensors travel.
            forgetful: Whether the worker is another one at each step, and knows nothing of what the
                one before has rounded away.
        """
        model = self.beginning()
        loss = torch.zeros(())
        sgd = optserve.optim.SGD(lr=0.1, momentum=0.9)
        named = model.named_parameters
        with RemoteOptimizer(named(), client, optimizer=sgd, wire=wire) as first:
            optimizer = first
            for step in range(self.STEPS):
                at = slice(step % 20 * 100, step % 20 * 100 + 100)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(self._inputs[at]), self._targets[at])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if forgetful:
                    optimizer.session.close()
                    session_id = first.session.session_id
                    optimizer = RemoteOptimizer.join(named(), client, session_id, worker=0)
            final = optimizer.session.download()
            if forgetful:
                optimizer.close()
            flat = np.concatenate([each.reshape(-1) for each in final.values()])
            return torch.from_numpy(flat), loss.item()


@pytest.fixture(scope="module")
def training() -> _Training:
    return _Training()


@pytest.fixture(scope="module")
def exact(training: _Training, client: Client) -> tuple[Tensor, float]:
    """Train without encodings."""
    return training.run(client, Wire())


def distance(training: _Training, one: Tensor, other: Tensor) -> float:
    """Return how far two runs have come apart, as a part of how far they have come at all."""
    parameters = training.beginning().parameters()
    beginning = torch.cat([each.detach().reshape(-1) for each in parameters])
    return float((one - other).norm() / (other - beginning).norm())


@pytest.mark.parametrize(
    ("encoding", "distance_max"),
    [
        pytest.param("BF16", 2e-3, id="bf16"),
        pytest.param("FP16", 5e-4, id="fp16"),
        pytest.param("INT8_BLOCKS", 1e-3, id="int8-blocks"),
    ],
)
def test_training_ends_where_it_would_have_ended(
    encoding: WireEncoding,
    distance_max: float,
    training: _Training,
    exact: tuple[Tensor, float],
    client: Client,
) -> None:
    parameters, loss = training.run(client, Wire(gradients=encoding, parameters=encoding))
    assert 0 < distance(training, parameters, exact[0]) < distance_max
    assert loss == pytest.approx(exact[1], rel=5e-3)


def test_error_feedback_is_better_than_none(
    training: _Training, exact: tuple[Tensor, float], client: Client
) -> None:
    wire = Wire(gradients="INT8_BLOCKS")
    compensated, _ = training.run(client, wire)
    forgotten, _ = training.run(client, wire, forgetful=True)
    lost = distance(training, forgotten, exact[0])
    assert distance(training, compensated, exact[0]) < lost / 4


def test_what_is_always_rounded_away_arrives_all_the_same(client: Client) -> None:
    gradient = np.array([127.0, *[0.3] * 9], np.float32)  # A scale of 1.
    with client.create_session(
        {"w": np.zeros(10, np.float32)},
        optimizer=optserve.optim.SGD(lr=1.0),
        wire=Wire(gradients="INT8_BLOCKS"),
    ) as session:
        for _ in range(100):
            session.step({"w": gradient})
        assert np.abs(session.parameters["w"][1:] - -30).max() <= 0.5 * 1.01


def test_encodings_are_in_force_and_in_the_reserved_memory(client: Client) -> None:
    values = values_of(SMALL, 1)
    count = sum(each.nbytes for each in values.values())
    reserved = {}
    for encoding in (None, *ENCODINGS):
        wire = Wire(gradients=encoding, parameters=encoding)
        options: Any = {"optimizer": optserve.optim.SGD(lr=1.0), "workers": 3, "wire": wire}
        with client.create_session(values, **options) as session:
            spec = session.update(display_name="still encoded").spec
            name = Encoding.Name(spec.wire.gradients)
            assert name == f"ENCODING_{encoding or 'UNSPECIFIED'}"
            assert spec.wire.parameters == spec.wire.gradients
            reserved[encoding] = session.status().reserved_bytes
    assert reserved["BF16"] == reserved["FP16"] == reserved[None]
    assert reserved["INT8_BLOCKS"] == reserved[None] + 3 * count  # What each worker has.


def test_elements_that_are_not_encoded_are_refused(process_driver: StubDriver) -> None:
    parameters = {"w": torch.zeros(10)}
    spec = SessionSpec(
        parameters=headers_of(parameters),
        optimizer=Optimizer(sgd=SGD(lr=1.0)),
        wire=WireMessage(gradients=Encoding.ENCODING_BF16),
    )
    session_id = process_driver.create(spec, parameters).status.session_id
    with (
        process_driver.worker(session_id) as worker,
        refused("BYTE_COUNT_MISMATCH", field="gradients[0]"),
    ):
        take(worker, 1, parameters)


def test_no_memory_is_shared_where_tensors_are_encoded(server: ServerProcess) -> None:
    config = ClientConfig(lane="shm")
    with (
        optserve.connect(server.address, config=config, progress=False) as client,
        client.create_session(
            values_of(SMALL, 1),
            optimizer=optserve.optim.SGD(lr=1.0),
            wire=Wire(parameters="BF16"),
        ) as session,
        pytest.raises(optserve.SharedMemoryError),
    ):
        session.step(values_of(SMALL, 2))
