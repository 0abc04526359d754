"""What is asked about tensors: their data types, shapes and sizes, and that absence is not zero."""

from __future__ import annotations

from author import (
    SMALL,
    Scenario,
    contribution,
    create,
    evaluate,
    gradients_of,
    join,
    model,
    one_by_one,
    plain,
    refused,
    round_of,
    step,
    with_loss,
)
from tensors import Json, given, of


def _layers(shape: list[int], seed: int = 1) -> list[Json]:
    """Return values, or gradients, of three parameters, one of them without elements."""
    return [
        given(shape, seed, name="weight"),
        given([0, 2], seed, name="nothing"),
        given([5], seed + 7, name="bias"),
    ]


def _every_gradient(shape: list[int], session: str) -> list[Json]:
    """Take steps with all gradients: again, out of turn, and with one that is not a number."""
    spec = {"parameters": _layers(shape), "optimizer": {"adam": {"lr": 0.125}}}
    weight, nothing, bias = _layers(shape, 4)
    nan = of([float("nan")] * 5, name="bias")
    return [
        create(spec, session),
        join(session),
        step(1, _layers(shape, 2), session),
        step(1, _layers(shape, 2), session),
        refused(step(3, _layers(shape, 3), session), "STEP_OUT_OF_ORDER", expected="2"),
        refused(step(2, [weight, nothing, nan], session), "NON_FINITE_GRADIENT", names="bias"),
        step(2, [bias, weight, nothing], session),
        step(3, [weight], session),
        step(4, _layers(shape, 5), session),
        step(None, _layers(shape, 6), session),
        plain("download_parameters", session),
    ]


TENSORS = [
    Scenario(
        name="absent-gradients",
        about="AdamW leaves a parameter without a gradient alone, and decays one with zeros.",
        acts=[
            create(
                {"parameters": model(), "optimizer": {"adamw": {"lr": 0.1, "weight_decay": 0.5}}}
            ),
            join(),
            step(1, gradients_of(1)[:1]),
            step(2, [gradients_of(2)[0], of([0.0, 0.0, 0.0], name="bias")]),
            step(3, gradients_of(3)[1:], via="stream"),
        ],
    ),
    Scenario(
        name="scalars-and-nothing",
        about="Tensors without dimensions, with one element and with none; all sorts of names.",
        acts=[
            create(
                {
                    "parameters": [
                        of(0.5, name="scalar"),
                        given([0, 4], 1, name="nothing"),
                        of([[[2.0]]], name="layers.0.weight [é]"),
                        of([-1.5], name="0"),
                    ],
                    "optimizer": {"adam": {}},
                }
            ),
            join(),
            step(
                1,
                [
                    of(3.0, name="scalar"),
                    given([0, 4], 1, name="nothing"),
                    of([[[4.0]]], name="layers.0.weight [é]"),
                ],
            ),
            step(2, [of(3.0, name="scalar"), of([4.0], name="0")]),
            plain("download_parameters"),
            plain("download_parameters", names=["nothing", "scalar"]),
        ],
    ),
    Scenario(
        name="data-types",
        about="Parameters of FP64, FP16 and BF16 beside FP32.",
        acts=[
            create(
                {
                    "parameters": [
                        given([3, 3], i, name=data_type, data_type=data_type)
                        for i, data_type in enumerate(("FP64", "FP16", "BF16", "FP32"))
                    ],
                    "optimizer": {"adam": {"lr": 0.125}},
                }
            ),
            join(),
            *(
                step(
                    number,
                    [
                        given([3, 3], 7 * number + i, name=data_type, data_type=data_type)
                        for i, data_type in enumerate(("FP64", "FP16", "BF16", "FP32"))
                    ],
                )
                for number in range(1, 4)
            ),
        ],
    ),
    Scenario(
        name="chunks",
        about="More parameters than fit into a message: chunks both ways, with small ones between.",
        acts=[
            create(
                {
                    "parameters": [
                        given([3], 1, name="first"),
                        given([900, 1100], 2, name="large"),
                        given([0], 3, name="empty"),
                        given([250, 1000], 4, name="medium"),
                        given([262144], 5, name="one-chunk"),
                        of(1.0, name="last"),
                    ],
                    "optimizer": {"sgd": {"lr": 0.5, "momentum": 0.5}},
                }
            ),
            join(),
            *(
                step(
                    number,
                    [
                        given([3], number + 1, name="first"),
                        given([900, 1100], number + 2, name="large"),
                        given([250, 1000], number + 4, name="medium"),
                        given([262144], number + 5, name="one-chunk"),
                        of(number / 2, name="last"),
                    ],
                )
                for number in (1, 2)
            ),
            plain("download_parameters"),
        ],
    ),
    Scenario(
        name="every-gradient",
        about="Steps with all gradients, of a small and a large model; one without some, between.",
        acts=[*_every_gradient([3, 5], "small"), *_every_gradient([900, 1100], "large")],
    ),
    Scenario(
        name="two-workers-of-large-models",
        about="One worker brings every gradient, and the other one not, in chunks.",
        acts=[
            create(
                {
                    "parameters": _layers([700, 1100]),
                    "optimizer": {"sgd": {"lr": 0.5, "momentum": 0.5}},
                    "workers": 2,
                }
            ),
            join(worker=0),
            join(worker=1),
            round_of(
                1,
                contribution(0, _layers([700, 1100], 2)),
                contribution(1, _layers([700, 1100], 3)),
            ),
            round_of(
                2,
                contribution(1, _layers([700, 1100], 4)),
                contribution(0, _layers([700, 1100], 5)[1:]),
            ),
        ],
    ),
    Scenario(
        name="large-loss",
        about="Predictions that do not fit into a message; the sums are exact in any order.",
        acts=[
            create(with_loss("mse_loss", reduction="SUM")),
            evaluate(
                given([1200, 1000], 1, modulo=3, subtract=1, divide=1),
                given([1200, 1000], 2, modulo=3, subtract=1, divide=1),
                split="TRAIN",
            ),
            evaluate(
                given([1200, 1000], 1, modulo=3, subtract=1, divide=1),
                given([1200, 1000], 2, modulo=3, subtract=1, divide=1),
                split="VALIDATION",
            ),
        ],
    ),
    Scenario(
        name="infinite-gradients",
        about="A session that allows it takes infinity as torch does.",
        acts=[
            create(SMALL | {"non_finite": "ALLOW"}),
            join(),
            step(1, one_by_one(float("inf"), 1.0)),
        ],
    ),
    Scenario(
        name="numbers-of-a-step",
        about="What comes with the parameters: the norm of the gradient, rates, epochs.",
        acts=[
            create(SMALL | {"groups": [{"name": "mine", "parameters": ["w"]}]}),
            join(),
            step(1, one_by_one(3.0, -4.0))
            | {
                "expect": {
                    "step": 1,
                    "epochs": 0,
                    "rates": {"mine": 0.5},
                    "gradient_norm": 5.0,
                    "replayed": False,
                    "parameters": [of([-0.5, 0.0], name="w")],
                }
            },
        ],
    ),
]
