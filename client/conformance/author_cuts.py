"""What is asked about connections that break: nothing is lost, and nothing happens twice."""

from __future__ import annotations

from author import Scenario, contribution, create, join, plain, round_of, step
from tensors import Json, given

_SHAPES = ([900, 1100], [5])
_BYTES = 4 * (900 * 1100 + 5)  # Of the parameters, and of the gradients of a step.
_INT8_BYTES = _BYTES // 4
_HALF = _BYTES // 2


def _tensors(seed: int) -> list[Json]:
    """Return parameters, or gradients: more than a message holds."""
    return [given(shape, seed + at, name=f"w{at}") for at, shape in enumerate(_SHAPES)]


def _few(seed: int) -> list[Json]:
    return [given([3, 5], seed, name="w0")]


CUTS = [
    Scenario(
        name="cut-while-sent",
        about="Cut in the middle of an upload, of a step, and of that step when it is sent again.",
        cuts=[{"sent": _HALF}, {"sent": _BYTES + _HALF}, {"sent": _HALF}],
        acts=[
            create({"parameters": _tensors(1), "optimizer": {"sgd": {"lr": 0.1, "momentum": 0.5}}}),
            join(),
            *(step(number, _tensors(10 * number)) for number in (1, 2)),
            plain("download_parameters"),
        ],
    ),
    Scenario(
        name="cut-while-answered",
        about="Cut in the middle of a step's answer, and of a download.",
        cuts=[{"answered": _HALF}, {"answered": _BYTES + _BYTES + _HALF}],
        acts=[
            create({"parameters": _tensors(1), "optimizer": {"adam": {"lr": 0.1}}}),
            join(),
            *(step(number, _tensors(10 * number)) for number in (1, 2)),
            plain("download_parameters"),
        ],
    ),
    Scenario(
        name="cut-small-steps",
        about="Cut every few hundred bytes, on a stream and without one.",
        cuts=[{"answered": 2000}, *([{"sent": 700}, {"answered": 500}] * 3)],
        acts=[
            create({"parameters": _few(1), "optimizer": {"sgd": {"lr": 0.1, "momentum": 0.5}}}),
            join(),
            *(step(number, _few(number)) for number in range(1, 11)),
            plain("leave", worker=0),
            *(step(number, _few(number), via="unary") for number in range(11, 21)),
            plain("download_parameters"),
        ],
    ),
    Scenario(
        name="cut-workers",
        about="Both workers of a round are cut off, while they send and while they are answered.",
        cuts=[{"sent": _BYTES + _BYTES + _HALF}, {"answered": _BYTES}],
        acts=[
            create(
                {"parameters": _tensors(1), "optimizer": {"sgd": {"lr": 0.1}}, "workers": 2},
            ),
            join(worker=0),
            join(worker=1),
            *(
                round_of(
                    number,
                    contribution(0, _tensors(10 * number)),
                    contribution(1, _tensors(10 * number + 5)),
                )
                for number in (1, 2)
            ),
            plain("download_parameters"),
        ],
    ),
    Scenario(
        name="wire-cut",
        about="What INT8 rounds away is the same when a step is sent again.",
        cuts=[{"sent": _BYTES + _INT8_BYTES // 2}, {"answered": _HALF}, {"sent": _INT8_BYTES // 2}],
        acts=[
            create(
                {
                    "parameters": _tensors(1),
                    "optimizer": {"adam": {"lr": 0.1}},
                    "wire": {"gradients": "INT8_BLOCKS"},
                }
            ),
            join(),
            *(step(number, _tensors(10 * number)) for number in (1, 2, 3)),
            plain("download_parameters"),
        ],
    ),
]
