"""Steps with a gradient for every parameter have forms of their own, which change no bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from drivers import take
from drivers_forms import FORMS, Form, FormDriver
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from refusals import refused
from scenarios.models import assert_same, create, gradients, model, spec
from torch import Tensor

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1.optimizer_pb2 import SGD, Adam

AT_THE_LIMIT = CHUNK_BYTES_MAX // 4  # Elements of FP32 that may just go packed.

MODELS: dict[str, dict[str, Tensor]] = {
    "small": model(),
    "mixed": {
        "half": model(torch.float16)["w"],
        "nothing": torch.zeros(0, 3),
        "double": model(torch.float64)["b"],
        "scalar": torch.tensor(2.0),
        "brain": model(torch.bfloat16)["b"],
    },
    "at-the-limit": {"w": torch.linspace(-1, 1, AT_THE_LIMIT - 5), "b": torch.ones(5)},
    "beyond-the-limit": {"w": torch.linspace(-1, 1, AT_THE_LIMIT), "b": torch.ones(5)},
    "many-chunks": {"w": torch.linspace(-1, 1, 3 * AT_THE_LIMIT + 1), "b": torch.ones(5)},
}


@pytest.fixture(scope="module")
def forms(grpc_address: str) -> Iterator[dict[Form, FormDriver]]:
    """Return a driver for each form, all of one server."""
    with ExitStack() as stack:
        yield {form: stack.enter_context(FormDriver(grpc_address, form)) for form in FORMS}


@pytest.fixture
def plain(grpc_driver: StubDriver) -> StubDriver:
    """Return a driver that announces all its gradients, and is in nothing of the others."""
    return grpc_driver


def gradients_of(values: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {name: (value * 3 + step).to(value.dtype) for name, value in values.items()}


@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
def test_a_step_is_the_same_in_every_form(
    forms: dict[Form, FormDriver], plain: StubDriver, values: dict[str, Tensor]
) -> None:
    wanted_id = create(plain, spec(Adam(lr=0.1), parameters=values), values)
    with ExitStack() as stack:
        wanted_worker = stack.enter_context(plain.worker(wanted_id))
        workers = []
        for driver in forms.values():
            session_id = create(driver, spec(Adam(lr=0.1), parameters=values), values)
            workers.append(stack.enter_context(driver.worker(session_id)))
        for step in (1, 2):
            wanted = take(wanted_worker, step, gradients_of(values, step))
            for worker in workers:
                came = take(worker, step, gradients_of(values, step))
                assert_same(came.parameters, wanted.parameters)
                assert came.result == wanted.result


def test_steps_of_one_stream_may_come_in_any_form(
    forms: dict[Form, FormDriver], plain: StubDriver
) -> None:
    mixed, wanted_id = create(plain, spec(Adam(lr=0.1))), create(plain, spec(Adam(lr=0.1)))
    with forms["packed"].worker(mixed) as worker, plain.worker(wanted_id) as other:
        # Every form follows every other one, and itself.
        for step, form in enumerate(itertools.chain(*itertools.product(FORMS, FORMS)), start=1):
            worker.form = form
            came, wanted = (take(each, step, gradients(step)) for each in (worker, other))
            assert_same(came.parameters, wanted.parameters)
            assert came.result == wanted.result


def test_a_step_without_some_gradients_may_follow_and_leaves_them_absent(
    forms: dict[Form, FormDriver], plain: StubDriver
) -> None:
    """What a packed step has left in memory is no gradient of the next one."""
    mixed, wanted_id = create(plain, spec(Adam(lr=0.1))), create(plain, spec(Adam(lr=0.1)))
    with forms["packed"].worker(mixed) as worker, plain.worker(wanted_id) as other:
        for step in range(1, 7):
            worker.form = FORMS[1 + step // 2 % 2]
            given = gradients(step)
            if step % 2 == 0:
                del given["w" if step % 4 else "b"]
            came, wanted = (take(each, step, given) for each in (worker, other))
            assert_same(came.parameters, wanted.parameters)
            assert came.result == wanted.result


@pytest.mark.parametrize("first", FORMS)
def test_a_step_may_be_sent_again_in_another_form(
    forms: dict[Form, FormDriver], plain: StubDriver, first: Form
) -> None:
    session_id = create(plain, spec(Adam(lr=0.1)))
    with forms["announced"].worker(session_id) as worker:
        worker.form = first
        answer = take(worker, 1, gradients(1))
        for form in FORMS:
            worker.form = form
            again = take(worker, 1, gradients(7))  # Whatever comes with it.
            assert again.result.replayed
            assert_same(again.parameters, answer.parameters)
            assert again.result.gradient_norm == answer.result.gradient_norm
    assert plain.get(session_id).status.steps == 1


def test_workers_of_one_round_may_contribute_in_different_forms(
    forms: dict[Form, FormDriver], plain: StubDriver
) -> None:
    shared, alike = (create(plain, spec(Adam(), workers=3)) for _ in range(2))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(forms[form].worker(shared, i)) for i, form in enumerate(FORMS)
        ]
        others = [stack.enter_context(plain.worker(alike, i)) for i in range(3)]
        for step in (1, 2, 3):
            came, wanted = (
                [
                    worker.start(step, gradients(10 * step + i)).result
                    for i, worker in enumerate(group)
                ]
                for group in (workers, others)
            )
            for mine, its in zip(came, wanted, strict=True):
                assert_same(mine(TIMEOUT_S).parameters, its(TIMEOUT_S).parameters)
                assert mine(TIMEOUT_S).result == its(TIMEOUT_S).result
            workers[0].form, workers[1].form, workers[2].form = (
                workers[1].form,
                workers[2].form,
                workers[0].form,
            )


@pytest.mark.parametrize("form", FORMS)
def test_a_contribution_that_the_round_has_already_is_not_taken_again(
    forms: dict[Form, FormDriver], plain: StubDriver, form: Form
) -> None:
    wanted = spec(SGD(lr=1), workers=2)
    wanted.limits.round_timeout_s = 0.05
    session_id = create(plain, wanted)
    with (
        forms[form].worker(session_id, 0) as first,
        forms["announced"].worker(session_id, 1) as second,
    ):
        with refused("ROUND_TIMEOUT"):
            take(first, 1, gradients(1))
        for other in FORMS:
            first.form = other
            with refused("ROUND_TIMEOUT"):
                take(first, 1, gradients(7))
        came = take(second, 1, gradients(2))
    mean = {name: (each + gradients(2)[name]) / 2 for name, each in gradients(1).items()}
    assert_same(came.parameters, {name: model()[name] - mean[name] for name in mean})


@pytest.mark.parametrize("form", FORMS)
def test_a_refused_step_may_be_taken_in_any_form(
    forms: dict[Form, FormDriver], plain: StubDriver, form: Form
) -> None:
    session_id = create(plain, spec(SGD(lr=1)))
    poison = gradients(1)
    poison["b"][2] = torch.nan
    with forms[form].worker(session_id) as worker:
        for other in FORMS:
            with refused("NON_FINITE_GRADIENT", field="gradients['b']"):
                take(worker, 1, poison)
            with refused("STEP_OUT_OF_ORDER", field="step"):
                take(worker, 2, gradients(2))
            worker.form = other
        came = take(worker, 1, gradients(1))
    assert_same(came.parameters, {n: model()[n] - each for n, each in gradients(1).items()})
