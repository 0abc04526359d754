"""What is asked about tensors: their data types, shapes and sizes, and that absence is not zero."""

from __future__ import annotations

from author import (
    SMALL,
    Scenario,
    create,
    evaluate,
    gradients_of,
    join,
    model,
    one_by_one,
    plain,
    step,
    with_loss,
)
from tensors import given, of

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
