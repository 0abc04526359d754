"""What is asked about optimizers, schedulers and losses."""

from __future__ import annotations

from author import Scenario, create, evaluate, gradients_of, join, model, plain, step, with_loss
from tensors import Json, given, of


def optimizer_scenario(
    name: str, about: str, optimizer: Json, of_bias: Json, scheduler: Json
) -> Scenario:
    """Ask for four steps with two groups and a schedule."""
    ((kind, _),) = optimizer.items()
    spec = {
        "parameters": model(),
        "optimizer": optimizer,
        "groups": [{"name": "bias", "parameters": ["bias"], "overrides": {kind: of_bias}}],
        "scheduler": scheduler,
    }
    steps = [step(None, gradients_of(number)) for number in range(1, 5)]
    return Scenario(name=name, about=about, effective=True, acts=[create(spec), join(), *steps])


HALVING: Json = {"step_lr": {"step_size": 2, "gamma": 0.5}}

OPTIMIZERS = [
    optimizer_scenario(
        "sgd",
        "Stochastic gradient descent.",
        {"sgd": {"lr": 0.1}},
        {"lr": 0.02, "weight_decay": 0.1},
        HALVING,
    ),
    optimizer_scenario(
        "sgd-momentum",
        "SGD with momentum and dampening.",
        {"sgd": {"lr": 0.1, "momentum": 0.9}},
        {"dampening": 0.5},
        HALVING,
    ),
    optimizer_scenario(
        "sgd-nesterov",
        "SGD with Nesterov's momentum; without it in one group.",
        {"sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
        {"momentum": 0.5, "nesterov": False, "maximize": True},
        {"exponential_lr": {"gamma": 0.9}},
    ),
    optimizer_scenario(
        "adam",
        "Adam.",
        {"adam": {"lr": 0.01, "betas": [0.8, 0.99], "weight_decay": 0.1}},
        {"lr": 0.1, "eps": 1e-4},
        {"multi_step_lr": {"milestones": [1, 3], "gamma": 0.3}},
    ),
    optimizer_scenario(
        "adam-amsgrad",
        "AMSGrad; without it in one group.",
        {"adam": {"lr": 0.01, "betas": [0.5, 0.5], "amsgrad": True}},
        {"amsgrad": False},
        {"lambda_lr": {"lr_lambda": "1 / (1 + epoch)"}},
    ),
    optimizer_scenario(
        "adamw",
        "AdamW, with torch's default weight decay.",
        {"adamw": {}},
        {"weight_decay": 0.0},
        HALVING,
    ),
    optimizer_scenario(
        "rmsprop",
        "RMSprop with momentum; centered in one group.",
        {"rmsprop": {"lr": 0.01, "momentum": 0.9}},
        {"centered": True, "alpha": 0.9, "momentum": 0.0},
        HALVING,
    ),
    optimizer_scenario(
        "adadelta", "Adadelta.", {"adadelta": {}}, {"rho": 0.5, "weight_decay": 0.1}, HALVING
    ),
    optimizer_scenario(
        "adagrad",
        "Adagrad with a decaying rate.",
        {"adagrad": {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}},
        {"lr_decay": 0.0, "weight_decay": 0.1},
        HALVING,
    ),
    optimizer_scenario(
        "adamax",
        "Adamax.",
        {"adamax": {}},
        {"betas": [0.5, 0.75]},
        {"exponential_lr": {"gamma": 0.5}},
    ),
]


def scheduler_scenario(name: str, about: str, scheduler: Json) -> Scenario:
    """Ask for five counts of a schedule: steps in one session, epochs in another."""
    groups = [{"name": "bias", "parameters": ["bias"], "overrides": {"sgd": {"lr": 0.3}}}]
    spec = {"parameters": model(), "optimizer": {"sgd": {"lr": 0.1}}, "groups": groups}
    acts = [create(spec | {"scheduler": scheduler}, "steps")]
    acts += [step(number, gradients_of(number), "steps", "unary") for number in range(1, 6)]
    acts.append(create(spec | {"scheduler": scheduler | {"unit": "EPOCHS"}}, "epochs"))
    for number in range(1, 6):
        acts.append(step(number, gradients_of(number), "epochs", "unary"))
        acts.append(plain("end_epoch", "epochs", epoch=number))
    return Scenario(name=name, about=about, effective=True, acts=acts)


SCHEDULERS = [
    scheduler_scenario("step-lr", "StepLR, by steps and by epochs.", {"step_lr": {"step_size": 2}}),
    scheduler_scenario(
        "multi-step-lr",
        "MultiStepLR, by steps and by epochs; a milestone given twice counts twice.",
        {"multi_step_lr": {"milestones": [3, 1, 3], "gamma": 0.5}},
    ),
    scheduler_scenario(
        "exponential-lr",
        "ExponentialLR, by steps and by epochs.",
        {"exponential_lr": {"gamma": 0.9}},
    ),
    scheduler_scenario(
        "lambda-lr",
        "LambdaLR with one expression for all groups.",
        {"lambda_lr": {"lr_lambda": "0.95 ** epoch"}},
    ),
    scheduler_scenario(
        "lambda-lr-groups",
        "LambdaLR with an expression for each group.",
        {"lambda_lr": {"group_lr_lambdas": ["1 if epoch < 2 else 0.1", "1 / (1 + epoch)"]}},
    ),
]


def loss_scenario(
    name: str, about: str, inputs: tuple[Json, Json], *losses: dict[str, object]
) -> Scenario:
    """Ask for a loss with several sets of arguments, each in a session of its own, each way."""
    predictions, targets = inputs
    kind = name.replace("-", "_")
    acts: list[Json] = []
    for i, arguments in enumerate(losses):
        label = "abcdefgh"[i]
        acts += [
            create(with_loss(kind, **arguments), label),
            evaluate(
                predictions, targets, label, split="TRAIN", via="stream" if i % 2 else "unary"
            ),
            evaluate(predictions, targets, label, split="VALIDATION"),
        ]
    acts.append(evaluate(predictions, targets, "a", gradient=True))
    return Scenario(name=name, about=about, effective=True, acts=acts)


SCORES = given([5, 4], 3)
CLASSES = of([0, 3, 2, 2, 1], data_type="INT64")
CLASS_WEIGHTS = of([1.0, 0.5, 2.0, 0.25])
PROBABILITIES = given([5, 4], 3, modulo=63, subtract=-1)
BITS = given([5, 4], 1, modulo=2, subtract=0, divide=1)
LOG_PROBABILITIES = given([5, 4], 3, modulo=63, subtract=64, divide=16)

LOSSES = [
    loss_scenario(
        "nll-loss",
        "NLLLoss: weights, a class to ignore, reductions.",
        (LOG_PROBABILITIES, CLASSES),
        {},
        {"weight": CLASS_WEIGHTS, "ignore_index": 2},
        {"reduction": "SUM"},
        {"reduction": "NONE"},
    ),
    loss_scenario(
        "cross-entropy-loss",
        "CrossEntropyLoss: weights, a class to ignore, smoothed labels, reductions.",
        (SCORES, CLASSES),
        {},
        {"weight": CLASS_WEIGHTS, "ignore_index": 1, "label_smoothing": 0.1},
        {"reduction": "SUM"},
        {"reduction": "NONE"},
    ),
    loss_scenario(
        "bce-loss",
        "BCELoss: weights, reductions, and the accuracy of yes and no.",
        (PROBABILITIES, BITS),
        {},
        {"weight": CLASS_WEIGHTS},
        {"reduction": "SUM"},
        {"reduction": "NONE"},
    ),
    loss_scenario(
        "kl-div-loss",
        "KLDivLoss: batchmean and the other reductions.",
        (LOG_PROBABILITIES, PROBABILITIES),
        {},
        {"reduction": "BATCHMEAN"},
        {"reduction": "SUM"},
        {"reduction": "NONE"},
    ),
    loss_scenario(
        "mse-loss",
        "MSELoss: its reductions.",
        (SCORES, PROBABILITIES),
        {},
        {"reduction": "SUM"},
        {"reduction": "NONE"},
    ),
    loss_scenario(
        "l1-loss",
        "L1Loss: its reductions.",
        (SCORES, PROBABILITIES),
        {},
        {"reduction": "SUM"},
        {"reduction": "NONE"},
    ),
    Scenario(
        name="losses-of-other-kinds-of-targets",
        about="Probabilities for CrossEntropyLoss, logarithms for KLDivLoss, and other data types.",
        acts=[
            create(with_loss("cross_entropy_loss", label_smoothing=0.25), "classes"),
            evaluate(SCORES, PROBABILITIES, "classes", split="TRAIN"),
            create(with_loss("kl_div_loss", log_target=True), "logarithms"),
            evaluate(
                LOG_PROBABILITIES,
                given([5, 4], 8, modulo=63, subtract=64),
                "logarithms",
                split="TRAIN",
            ),
            create(with_loss("mse_loss"), "types"),
            *(
                evaluate(
                    given([4], 1, data_type=data_type),
                    given([4], 2, data_type=data_type),
                    "types",
                    split="TRAIN",
                )
                for data_type in ("FP64", "BF16", "FP16")
            ),
        ],
    ),
]

CATALOGUE = [*OPTIMIZERS, *SCHEDULERS, *LOSSES]
