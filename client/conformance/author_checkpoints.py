"""What is asked about checkpoints: saved, listed, gone on from, downloaded, deleted."""

from __future__ import annotations

from author import (
    SMALL,
    Scenario,
    create,
    evaluate,
    gradients_of,
    model,
    one_by_one,
    plain,
    refused,
    step,
)
from tensors import Json, given, header_of, of


def save(name: str, session: str = "a") -> Json:
    """Save a session."""
    return plain("save_checkpoint", session, name=name)


def restore(name: str, restored: str, session: str = "a", **keys: object) -> Json:
    """Make a session that goes on from a checkpoint."""
    return plain("restore_checkpoint", session, name=name, restored=restored, **keys)


def download(name: str, session: str = "a") -> Json:
    """Have the file of a checkpoint."""
    return plain("download_checkpoint", session, name=name)


def delete(name: str, session: str = "a") -> Json:
    """Delete a checkpoint."""
    return plain("delete_checkpoint", session, name=name)


LIFE = Scenario(
    name="checkpoints",
    about="A session is saved twice, goes on, and is gone; others go on from both, as it did.",
    acts=[
        create(
            {
                "display_name": "first",
                "parameters": model(),
                "optimizer": {"adam": {"lr": 0.125}},
                "groups": [{"name": "bias", "parameters": ["bias"]}],
                "scheduler": {"step_lr": {"step_size": 2, "gamma": 0.5}},
                "loss": {"mse_loss": {}},
            }
        ),
        step(1, gradients_of(1), via="unary"),
        plain("end_epoch"),
        evaluate(of([1.0, 2.0]), of([0.0, 4.0]), split="TRAIN"),
        save("early"),
        save("early"),
        plain("list_checkpoints"),
        step(2, gradients_of(2), via="unary"),
        refused(save("early"), "CHECKPOINT_EXISTS", field="name", actual="early"),
        save("late"),
        step(3, gradients_of(3), via="unary"),
        restore("early", "b"),
        plain("list_loss_points", "b"),
        step(2, gradients_of(2), "b", via="unary"),
        step(3, gradients_of(3), "b", via="unary"),
        step(4, gradients_of(9), via="unary"),
        plain("delete_session"),
        plain("list_checkpoints"),
        {"act": "list_checkpoints", "page_size": 1},
        restore("late", "c", display_name="second"),
        plain("update_session", "c", update={"optimizer": {"adam": {"lr": 0.5}}}),
        step(3, gradients_of(7), "c", via="unary"),
        delete("early"),
        {"act": "list_checkpoints"},
        refused(restore("early", "d"), "CHECKPOINT_NOT_FOUND", field="name"),
        step(4, gradients_of(8), "b", via="unary"),
        delete("late"),
        {"act": "list_checkpoints"},
    ],
)

STREAMS = Scenario(
    name="checkpoints-of-two-workers",
    about="A step that waits for the other worker is in no checkpoint; both start anew from it.",
    acts=[
        create(SMALL | {"workers": 2}),
        *(plain("join", worker=worker) for worker in (0, 1)),
        {
            "act": "round",
            "session": "a",
            "step": 1,
            "contributions": [
                {"worker": 0, "gradients": one_by_one(1.0, 0.0)},
                {"worker": 1, "gradients": one_by_one(0.0, 3.0)},
            ],
        },
        save("one"),
        restore("one", "b"),
        *(plain("join", "b", worker=worker) for worker in (1, 0)),
        {
            "act": "round",
            "session": "b",
            "step": 2,
            "contributions": [
                {"worker": 1, "gradients": one_by_one(4.0, 1.0)},
                {"worker": 0, "gradients": one_by_one(-2.0, 1.0)},
            ],
        },
        plain("download_parameters", "b"),
        plain("download_parameters"),
        delete("one"),
    ],
)

FILES = Scenario(
    name="checkpoint-files",
    about="What a checkpoint's file holds: of optimizers that keep nothing, one thing, or several.",
    acts=[
        create({"parameters": model(), "optimizer": {"sgd": {"lr": 0.5}}}),
        step(1, gradients_of(1), via="unary"),
        save("plain"),
        download("plain"),
        delete("plain"),
        create({"parameters": model(), "optimizer": {"sgd": {"lr": 0.5, "momentum": 0.5}}}, "b"),
        step(1, gradients_of(1), "b", via="unary"),
        step(2, gradients_of(2), "b", via="unary"),
        save("momentum", "b"),
        download("momentum", "b"),
        delete("momentum", "b"),
        create(
            {
                "parameters": model(),
                "optimizer": {"adamw": {"lr": 0.25, "amsgrad": True}},
                "groups": [
                    {
                        "name": "bias",
                        "parameters": ["bias"],
                        "overrides": {"adamw": {"lr": 0.125}},
                    }
                ],
            },
            "c",
        ),
        step(1, gradients_of(1), "c", via="unary"),
        save("several", "c"),
        plain("delete_session", "c"),
        download("several", "c"),
        delete("several", "c"),
    ],
)

LARGE = Scenario(
    name="large-checkpoint",
    about="The file of a checkpoint comes in several messages.",
    acts=[
        create(
            {
                "parameters": [given([700, 1000], 1, name="w")],
                "optimizer": {"sgd": {"lr": 0.5, "momentum": 0.5}},
            }
        ),
        plain("join"),
        step(1, [given([700, 1000], 2, name="w")]),
        save("large"),
        download("large"),
        restore("large", "b"),
        plain("join", "b"),
        step(2, [given([700, 1000], 3, name="w")], "b"),
        delete("large"),
    ],
)

REFUSED = Scenario(
    name="refused-checkpoints",
    about="Names that are taken, are none, or name nothing; sessions that are not there.",
    acts=[
        create({**SMALL, "parameters": [header_of([2], name="w")]}),
        plain("list_checkpoints"),
        refused(save(""), "INVALID_NAME", field="name"),
        refused(restore("best", "b"), "CHECKPOINT_NOT_FOUND", field="name"),
        refused(download("best"), "CHECKPOINT_NOT_FOUND", field="name"),
        refused(delete("best"), "CHECKPOINT_NOT_FOUND", field="name"),
        plain("upload_parameters", parameters=[of([1.0, -2.0], name="w")]),
        save("best"),
        step(1, one_by_one(1.0, 0.5), via="unary"),
        refused(save("best"), "CHECKPOINT_EXISTS", field="name", actual="best"),
        delete("best"),
        save("best"),
        plain("delete_session"),
        refused(save("other"), "SESSION_NOT_FOUND"),
        delete("best"),
        refused(delete("best"), "CHECKPOINT_NOT_FOUND", field="name"),
        refused(restore("best", "b"), "CHECKPOINT_NOT_FOUND", field="name"),
    ],
)

CHECKPOINTS = (LIFE, STREAMS, FILES, LARGE, REFUSED)
