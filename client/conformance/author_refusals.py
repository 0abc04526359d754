"""What is asked and refused, with its reason; nothing is changed by it."""

from __future__ import annotations

from author import (
    SMALL,
    Scenario,
    create,
    evaluate,
    gradients_of,
    join,
    model,
    plain,
    refused,
    refused_create,
    step,
    with_loss,
)
from tensors import Json, given, header_of, of


def bad_steps(via: str) -> Scenario:
    """Ask for steps that are refused, between two that are taken."""

    def bad(gradients: list[Json], reason: str, number: int = 2, **facts: str) -> Json:
        return refused(step(number, gradients, via=via), reason, **facts)

    return Scenario(
        name=f"refused-steps-{via}",
        about="A refused step changes nothing, the next one is taken, the last one answered anew.",
        acts=[
            create({"parameters": model(), "optimizer": {"adam": {"lr": 0.1}}}),
            *([join()] if via == "stream" else []),
            step(1, gradients_of(1), via=via),
            bad([given([2, 3], 1, name="weight")], "SHAPE_MISMATCH", names="weight"),
            bad([given([3], 1, name="bias", data_type="FP64")], "DATA_TYPE_MISMATCH", names="bias"),
            bad([given([3], 1, name="baes")], "UNKNOWN_NAME", names="baes"),
            bad([of([1.0, float("nan"), 1.0], name="bias")], "NON_FINITE_GRADIENT", names="bias"),
            bad([of([1.0, float("inf"), 1.0], name="bias")], "NON_FINITE_GRADIENT", names="bias"),
            bad([], "NO_GRADIENT"),
            bad(gradients_of(2), "STEP_OUT_OF_ORDER", 3, expected="2", actual="3"),
            bad(gradients_of(2), "STEP_OUT_OF_ORDER", 0, expected="2"),
            step(1, gradients_of(1), via=via),
            step(2, gradients_of(2), via=via),
            step(None, gradients_of(3), via=via),
            plain("get_session"),
        ],
    )


def bad_spec(**changes: object) -> Json:
    """Return a small spec with something wrong in it."""
    return SMALL | changes


def conflicts(via: str) -> list[Json]:
    """Take a step's number again with other content, and with the same one, before and after."""

    def other(number: int, gradients: list[Json]) -> Json:
        return refused(step(number, gradients, via, via), "STEP_CONFLICT")

    return [
        create({"parameters": model(), "optimizer": {"adam": {"lr": 0.1}}}, via),
        *([join(via)] if via == "stream" else []),
        step(1, gradients_of(1), via, via),
        other(1, gradients_of(2)),
        other(1, gradients_of(1)[:1]),
        step(1, gradients_of(1), via, via),
        step(2, gradients_of(2)[1:], via, via),
        other(2, gradients_of(2)),
        other(2, gradients_of(2)[:1]),
        step(2, gradients_of(2)[1:], via, via),
        step(3, gradients_of(1), via, via),
        plain("download_parameters", via),
    ]


REFUSALS = [
    bad_steps("stream"),
    bad_steps("unary"),
    Scenario(
        name="conflicting-steps",
        about="Other content under the number of a step that was taken is not mistaken for it.",
        acts=[*conflicts("stream"), *conflicts("unary")],
    ),
    Scenario(
        name="refused-sessions",
        about="What no session is made from, with the field at fault.",
        acts=[
            refused_create(
                bad_spec(optimizer={"sgd": {"lr": 0.1, "momentun": 0.9}}),
                {"reason": "UNKNOWN_FIELD", "names": "momentun"},
            ),
            refused_create(
                bad_spec(scheduler={"step_lr": {"step_size": 2, "gama": 0.9}}),
                {"reason": "UNKNOWN_FIELD", "names": "gama"},
            ),
            *(
                refused_create(
                    bad_spec(optimizer={"sgd": {"lr": lr}}),
                    {"reason": "INVALID_HYPERPARAMETER", "field": "spec.optimizer.sgd.lr"},
                )
                for lr in (-0.1, "NaN", "Infinity")
            ),
            refused_create(
                bad_spec(optimizer={"adam": {"betas": [0.9]}}),
                {"reason": "INVALID_HYPERPARAMETER", "field": "spec.optimizer.adam.betas"},
            ),
            refused_create(
                bad_spec(optimizer={"sgd": {"nesterov": True}}),
                {"reason": "INVALID_HYPERPARAMETER"},
            ),
            refused_create(
                bad_spec(groups=[{"name": "g", "parameters": ["v"]}]),
                {"reason": "UNKNOWN_NAME", "names": "v"},
            ),
            refused_create(
                bad_spec(
                    groups=[
                        {
                            "name": "g",
                            "parameters": ["w"],
                            "overrides": {"sgd": {"weight_decay": -1.0}},
                        }
                    ]
                ),
                {
                    "reason": "INVALID_HYPERPARAMETER",
                    "field": "spec.groups[0].overrides.sgd.weight_decay",
                },
            ),
            refused_create(
                bad_spec(groups=[{"name": "g", "parameters": ["w"], "overrides": {"adam": {}}}]),
                {"reason": "INVALID_FIELD"},
            ),
            refused_create(
                bad_spec(scheduler={"lambda_lr": {"lr_lambda": "__import__('os').getpid()"}}),
                {"reason": "INVALID_EXPRESSION"},
            ),
            refused_create(
                bad_spec(scheduler={"step_lr": {}}),
                {"reason": "MISSING_FIELD", "names": "step_size"},
            ),
            refused_create(
                bad_spec(loss={"mse_loss": {"reduction": "BATCHMEAN"}}), {"reason": "INVALID_FIELD"}
            ),
            refused_create(
                bad_spec(parameters=[]), {"reason": "MISSING_FIELD", "field": "spec.parameters"}
            ),
            refused_create(
                bad_spec(parameters=[of([1.0], name="a\0b")]), {"reason": "INVALID_NAME"}
            ),
            refused_create(
                bad_spec(parameters=[of([1], name="w", data_type="INT64")]),
                {"reason": "INVALID_FIELD", "field": "spec.parameters[0].data_type"},
            ),
            refused_create(
                bad_spec(parameters=[header_of([1 << 40], name="w")]), {"reason": "LIMIT_EXCEEDED"}
            ),
            {"act": "list_sessions", "expect": {"sessions": []}},
        ],
    ),
    Scenario(
        name="refused-evaluations",
        about="Predictions and targets that do not fit the loss, or each other.",
        acts=[
            create(with_loss("cross_entropy_loss")),
            *(
                act
                for via in ("unary", "stream")
                for act in (
                    refused(
                        evaluate(given([2, 3], 1), of([0, 3], data_type="INT64"), via=via),
                        "TARGET_OUT_OF_RANGE",
                        names="3",
                    ),
                    refused(
                        evaluate(given([2, 3], 1), of([0], data_type="INT64"), via=via),
                        "SHAPE_MISMATCH",
                    ),
                    refused(
                        evaluate(
                            of([[1, 2]], data_type="INT64"), of([0], data_type="INT64"), via=via
                        ),
                        "DATA_TYPE_MISMATCH",
                    ),
                )
            ),
            evaluate(given([2, 3], 1), of([0, 2], data_type="INT64"), split="TRAIN"),
            plain("list_loss_points"),
        ],
    ),
]
