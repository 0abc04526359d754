"""What is asked about sessions: their life, their epochs, their history, their workers."""

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
from reference import catalogue
from tensors import given, header_of, of

LIFE = Scenario(
    name="life-of-a-session",
    about="Created without values, uploaded in two parts, trained, read, changed, listed, deleted.",
    acts=[
        create(
            {
                "display_name": "classifier",
                "parameters": [header_of([3, 2], name="weight"), header_of([3], name="bias")],
                "optimizer": {"sgd": {"lr": 0.1, "momentum": 0.5}},
                "groups": [{"name": "bias", "parameters": ["bias"]}],
            }
        ),
        refused(step(1, gradients_of(1), via="unary"), "PARAMETERS_NOT_SET"),
        plain("upload_parameters", parameters=[model()[1]]),
        plain("get_session"),
        plain("upload_parameters", parameters=[model()[0]]),
        step(1, gradients_of(1), via="unary"),
        plain("download_parameters"),
        plain("download_parameters", names=["bias"]),
        plain("upload_parameters", parameters=[given([3], 9, name="bias")]),
        plain(
            "update_session", update={"optimizer": {"sgd": {"lr": 0.25}}, "display_name": "again"}
        ),
        step(2, gradients_of(2), via="unary"),
        plain(
            "update_session",
            update={
                "groups": [
                    {"name": "bias", "overrides": {"sgd": {"lr": 0.5, "weight_decay": 0.125}}}
                ]
            },
        ),
        step(3, gradients_of(3), via="unary"),
        refused(evaluate(of([1.0]), of([0.0])), "LOSS_NOT_SET"),
        plain("update_session", update={"loss": {"mse_loss": {}}}),
        evaluate(of([1.0, 2.0]), of([0.0, 4.0]), split="TRAIN"),
        plain("get_session"),
        create(SMALL | {"display_name": "another"}, "b"),
        {"act": "list_sessions"},
        {"act": "list_sessions", "page_size": 1},
        plain("delete_session", "b"),
        {"act": "list_sessions"},
        plain("delete_session"),
        {
            "act": "get_session",
            "session_id": "0123456789abcdef0123456789abcdef",
            "refused": {"reason": "SESSION_NOT_FOUND"},
        },
        refused(plain("download_parameters"), "SESSION_NOT_FOUND"),
    ],
)

EPOCHS = Scenario(
    name="epochs",
    about="An epoch ends once, in its turn, and not without a step.",
    acts=[
        create(SMALL | {"scheduler": {"exponential_lr": {"gamma": 0.5}, "unit": "EPOCHS"}}),
        refused(plain("end_epoch", epoch=1), "EPOCH_EMPTY"),
        step(1, one_by_one(1.0, 0.5), via="unary"),
        refused(plain("end_epoch", epoch=2), "EPOCH_OUT_OF_ORDER", expected="1"),
        plain("end_epoch", epoch=1),
        plain("end_epoch", epoch=1),
        step(2, one_by_one(1.0, 0.5), via="unary"),
        plain("end_epoch"),
        plain("get_session"),
    ],
)

HISTORY = Scenario(
    name="loss-history",
    about="Evaluations with a split are kept, as many as the session asked for; in pages.",
    acts=[
        create(with_loss("cross_entropy_loss") | {"limits": {"loss_points_max": 2}}),
        *(
            act
            for number in range(1, 4)
            for act in (
                evaluate(given([4, 3], number), of([0, 1, 2, 0], data_type="INT64"), split="TRAIN"),
                evaluate(given([4, 3], number + 9), of([2, 1, 0, 0], data_type="INT64")),
                evaluate(
                    given([4, 3], number), of([1, 1, 1, 0], data_type="INT64"), split="VALIDATION"
                ),
                step(number, one_by_one(1.0, 0.5), via="unary"),
                plain("end_epoch"),
            )
        ),
        plain("list_loss_points"),
        plain("list_loss_points", page_size=1),
        plain("list_loss_points", split="TRAIN"),
        plain("list_loss_points", split="VALIDATION", page_size=2),
    ],
)


def workers_scenario(name: str, about: str, order: list[int], ways: dict[int, str]) -> Scenario:
    """Ask for two rounds of several workers who arrive in ``order``."""
    spec = {"parameters": model(), "optimizer": {"adam": {"lr": 0.1}}, "workers": len(order)}
    joins = [join(worker=worker) for worker in sorted(order) if ways.get(worker) != "unary"]
    rounds = [
        round_of(
            number,
            *(
                contribution(w, gradients_of(10 * number + w), ways.get(w, "stream"))
                for w in (order if number == 1 else reversed(order))
            ),
        )
        for number in (1, 2)
    ]
    return Scenario(name=name, about=about, acts=[create(spec), *joins, *rounds])


WORKERS = [
    workers_scenario(
        "two-workers", "A step is the mean of both, in either order of arrival.", [0, 1], {}
    ),
    workers_scenario(
        "four-workers",
        "Four workers, two of them without a stream.",
        [2, 0, 3, 1],
        {1: "unary", 2: "unary"},
    ),
    Scenario(
        name="two-workers-absent-gradients",
        about="A gradient that one worker lacks counts as zeros; one that both lack stays absent.",
        acts=[
            create({"parameters": model(), "optimizer": {"adamw": {"lr": 0.1}}, "workers": 2}),
            join(worker=0),
            join(worker=1),
            round_of(1, contribution(0, gradients_of(1)[:1]), contribution(1, gradients_of(2)[:1])),
            round_of(2, contribution(1, gradients_of(3)[:1]), contribution(0, gradients_of(4))),
            round_of(3, contribution(0, []), contribution(1, gradients_of(5)[1:])),
        ],
    ),
    Scenario(
        name="a-worker-is-one",
        about="A second call for a worker is refused, and so is a worker that there is not.",
        acts=[
            create(SMALL),
            join(),
            refused(join(), "WORKER_BUSY"),
            refused(step(1, one_by_one(1.0, 1.0), via="unary"), "WORKER_BUSY"),
            refused(join(worker=1), "INVALID_FIELD", names="worker"),
            step(1, one_by_one(1.0, 1.0)),
            plain("leave", worker=0),
            step(2, one_by_one(1.0, 1.0), via="unary"),
            join(),
            step(3, one_by_one(1.0, 1.0)),
        ],
    ),
]

SERVER = Scenario(
    name="server",
    about="What the server says about itself, and what it offers.",
    acts=[
        {
            "act": "server_info",
            "expect": {
                "device": "cpu",
                "limits": {"chunk_bytes_max": 1 << 20, "message_bytes_max": 4 << 20},
            },
        },
        {"act": "catalogue", "expect": catalogue()},
    ],
)

SESSIONS = [LIFE, EPOCHS, HISTORY, *WORKERS, SERVER]
