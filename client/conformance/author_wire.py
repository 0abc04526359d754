"""What is asked about encodings: fewer bytes, and just the bits that they should bring."""

from __future__ import annotations

from author import (
    Scenario,
    contribution,
    create,
    join,
    plain,
    refused,
    round_of,
    step,
)
from tensors import Json, given, of

_LARGE, _RAGGED = [900, 1100], [1100]  # Chunks, and blocks the last of which is not full.


def _given(shape: list[int], seed: int, name: str) -> Json:
    """Return values of 16 bits each: no encoding holds them all."""
    return given(shape, seed, name=name, modulo=65521, subtract=32760, divide=8192)


def _model(*shapes: list[int]) -> list[Json]:
    return [_given(shape, seed, f"w{seed}") for seed, shape in enumerate(shapes)]


def _gradients(number: int, *shapes: list[int]) -> list[Json]:
    return [_given(shape, 10 * number + at, f"w{at}") for at, shape in enumerate(shapes)]


def _encoded(encoding: str) -> Scenario:
    shapes: tuple[list[int], ...] = ([3, 4], [], [0, 4], _RAGGED)
    wire = {"gradients": encoding, "parameters": encoding}
    large = (_RAGGED, _LARGE, [5])
    return Scenario(
        name=f"wire-{encoding.lower().replace('_', '-')}",
        about=f"{encoding} both ways: small steps and large ones, and an absent gradient.",
        acts=[
            create({"parameters": _model(*shapes), "optimizer": {"adam": {}}, "wire": wire}),
            join(),
            *(step(number, _gradients(number, *shapes)) for number in (1, 2, 3)),
            step(4, _gradients(4, *shapes)[1:]),
            step(5, _gradients(5, *shapes)),
            plain("download_parameters"),
            create(
                {"parameters": _model(*large), "optimizer": {"sgd": {"lr": 0.1}}, "wire": wire}, "b"
            ),
            join("b"),
            *(step(number, _gradients(number, *large), "b") for number in (1, 2, 3)),
            plain("download_parameters", "b"),
        ],
    )


def _streams(encoding: str) -> list[Json]:
    """Take steps on a stream, without one, and on another one."""
    session, shapes = encoding.lower(), ([3, 4], _RAGGED)
    model = {"parameters": _model(*shapes), "optimizer": {"adam": {}}}
    return [
        create(model | {"wire": {"parameters": encoding}}, session),
        join(session),
        *(step(number, _gradients(number, *shapes), session) for number in (1, 2)),
        plain("leave", session, worker=0),
        step(3, _gradients(3, *shapes), session, via="unary"),
        join(session),
        *(step(number, _gradients(number, *shapes), session) for number in (4, 5)),
        plain("download_parameters", session),
    ]


def _mistakes(encoding: str) -> list[Json]:
    session = encoding.lower()
    spec = {"parameters": [of([1.0, -2.0], name="w")], "optimizer": {"sgd": {"lr": 0.5}}}
    return [
        create(spec | {"wire": {"gradients": encoding}}, session),
        join(session),
        *(
            refused(
                step(1, [of([1.0, value], name="w")], session),
                "NON_FINITE_GRADIENT",
                names="w",
            )
            for value in (float("nan"), float("inf"))
        ),
        step(1, [of([0.7, -0.3], name="w")], session),
    ]


WIRE = [
    *(_encoded(encoding) for encoding in ("BF16", "FP16", "INT8_BLOCKS")),
    Scenario(
        name="wire-streams",
        about="A new stream knows nothing of what the one before it brought.",
        acts=[act for encoding in ("BF16", "INT8_BLOCKS") for act in _streams(encoding)],
    ),
    Scenario(
        name="wire-two-workers",
        about="Each worker of two keeps what INT8 has rounded away of its own gradients.",
        acts=[
            create(
                {
                    "parameters": _model([40, 30], [30]),
                    "optimizer": {"adamw": {"lr": 0.01}},
                    "workers": 2,
                    "wire": {"gradients": "INT8_BLOCKS", "parameters": "BF16"},
                }
            ),
            join(worker=0),
            join(worker=1),
            *(
                round_of(
                    number,
                    contribution(1, _gradients(2 * number, [40, 30], [30])),
                    contribution(0, _gradients(2 * number + 1, [40, 30], [30])),
                )
                for number in (1, 2, 3)
            ),
        ],
    ),
    Scenario(
        name="wire-not-finite",
        about="No encoding hides a NaN or an infinity, and a refused step leaves nothing behind.",
        acts=[act for encoding in ("BF16", "FP16", "INT8_BLOCKS") for act in _mistakes(encoding)],
    ),
    Scenario(
        name="wire-refused",
        about="Encodings are for FP32.",
        acts=[
            refused(
                create(
                    {
                        "parameters": [of([1.0], name="w", data_type=data_type)],
                        "optimizer": {"sgd": {}},
                        "wire": {direction: "BF16"},
                    },
                    "none",
                ),
                "INVALID_FIELD",
                field=f"spec.wire.{direction}",
            )
            for data_type in ("FP64", "FP16", "BF16")
            for direction in ("gradients", "parameters")
        ],
    ),
]
