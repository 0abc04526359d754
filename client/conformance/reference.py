"""What must come: torch's own optimizers, schedulers and losses, played act by act."""

from __future__ import annotations

import inspect
import itertools
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from google.protobuf.descriptor import Descriptor
from tensors import Json, to_json, to_torch
from torch import Tensor
from wire import Wire

from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
}
SCHEDULERS: dict[str, type[torch.optim.lr_scheduler.LRScheduler]] = {
    "step_lr": torch.optim.lr_scheduler.StepLR,
    "multi_step_lr": torch.optim.lr_scheduler.MultiStepLR,
    "exponential_lr": torch.optim.lr_scheduler.ExponentialLR,
    "lambda_lr": torch.optim.lr_scheduler.LambdaLR,
}
LOSSES: dict[str, type[torch.nn.Module]] = {
    "nll_loss": torch.nn.NLLLoss,
    "cross_entropy_loss": torch.nn.CrossEntropyLoss,
    "bce_loss": torch.nn.BCELoss,
    "kl_div_loss": torch.nn.KLDivLoss,
    "mse_loss": torch.nn.MSELoss,
    "l1_loss": torch.nn.L1Loss,
}
NOT_OFFERED = {
    *("params", "capturable", "differentiable"),  # of optimizers
    *("optimizer", "last_epoch"),  # of schedulers
    *("size_average", "reduce"),  # of losses
}


def defaults_of(torch_class: type) -> Json:
    """Return torch's default of each argument on offer; without those that are None."""
    parameters = inspect.signature(torch_class).parameters.values()
    return {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in parameters
        if p.name not in NOT_OFFERED and p.default is not p.empty and p.default is not None
    }


def catalogue() -> Json:
    """Return what can be chosen, in the order of the contract, with torch's defaults."""
    return {
        "optimizers": _entries(optimizer_pb2.Optimizer.DESCRIPTOR, OPTIMIZERS),
        "schedulers": _entries(scheduler_pb2.Scheduler.DESCRIPTOR, SCHEDULERS),
        "losses": _entries(loss_pb2.Loss.DESCRIPTOR, LOSSES),
    }


class Session:
    """One session, as torch alone would have it. Acts are methods; they return what must come."""

    def __init__(self, spec: Json, *, effective: bool) -> None:
        """Make it.

        Args:
            spec: Of the contract.
            effective: Whether answers shall hold the spec with torch's defaults filled in.
        """
        self.spec = dict(spec)
        self._shows_spec = effective
        self._parameters = {p["name"]: _value_of(p) for p in spec["parameters"]}
        self._missing = {
            p["name"] for p in spec["parameters"] if "data" not in p and "pattern" not in p
        }
        ((self._kind, hyperparameters),) = spec["optimizer"].items()
        self._torch_class = OPTIMIZERS[self._kind]
        self._base = self._in_force(hyperparameters)
        self._groups = self._grouped(spec.get("groups", []))
        self._optimizer = self._torch_class(
            [
                {"params": [self._parameters[name] for name in group["parameters"]]}
                | group["overrides"][self._kind]
                for group in self._groups
            ],
            **self._base,
        )
        self._scheduler = self._build_scheduler(spec.get("scheduler"))
        self._wire = Wire(spec.get("wire", {}))
        self._loss: Json = spec.get("loss", {})
        self._points: list[Json] = []
        self._sequence = itertools.count(1)
        self._steps = 0
        self._epochs = 0
        self._last: Json = {}

    @property
    def status(self) -> Json:
        """Where the session stands."""
        return {
            "display_name": self.spec.get("display_name", ""),
            "state": "AWAITING_PARAMETERS" if self._missing else "READY",
            "steps": self._steps,
            "epochs": self._epochs,
            "rates": self._rates(),
            "optimizer": self._torch_class.__name__,
            "workers": self.spec.get("workers", 1),
            "parameter_count": sum(p.numel() for p in self._parameters.values()),
        }

    @property
    def effective_spec(self) -> Json:
        """The parts of the spec to which torch's defaults are added."""
        spec: Json = {"optimizer": {self._kind: self._base}, "groups": self._groups}
        if scheduler := self.spec.get("scheduler"):
            spec["scheduler"] = {
                kind: defaults_of(SCHEDULERS[kind]) | arguments
                for kind, arguments in scheduler.items()
                if kind != "unit"
            } | {"unit": scheduler.get("unit", "STEPS")}
        if self._loss:
            ((kind, arguments),) = self._loss.items()
            defaults = defaults_of(LOSSES[kind])
            spec["loss"] = {
                kind: defaults | {"reduction": defaults["reduction"].upper()} | arguments
            }
        return spec

    def join(self, act: Json) -> Json:
        """Open a worker's stream."""
        self._wire.open(act.get("worker", 0))
        return self.status

    def describe(self, _: Json) -> Json:
        """Say where the session stands, and what is in force."""
        return {"status": self.status} | ({"spec": self.effective_spec} if self._shows_spec else {})

    def leave(self, _: Json) -> Json:
        """Close a stream."""
        return {}

    def upload(self, act: Json) -> Json:
        """Set values of parameters."""
        for tensor in act["parameters"]:
            self._parameters[tensor["name"]].copy_(to_torch(tensor))
            self._missing.discard(tensor["name"])
        return self.status

    def download(self, act: Json) -> Json:
        """Read values of parameters."""
        names = act.get("names") or list(self._parameters)
        return {"steps": self._steps, "parameters": self._written(names)}

    def step(self, act: Json) -> Json:
        """Take a step; a repetition answers as it did the first time."""
        if act.get("step") == self._steps:
            return self._last | {"replayed": True}
        rates = self._rates()
        self._optimizer.step()
        if self._scheduler and self.spec["scheduler"].get("unit") != "EPOCHS":
            self._scheduler.step()
        self._steps += 1
        self._last = {"step": self._steps, "epochs": self._epochs, "rates": rates}
        contributions = act.get("contributions", [act])
        seen = [
            self._wire.parameters(
                each.get("worker", 0), each.get("via", "stream"), self._parameters
            )
            for each in contributions
        ]
        written = [to_json(value, name) for name, value in seen[0].items()]
        self._last |= {"replayed": False, "parameters": written}
        return self._last

    def step_alone(self, act: Json) -> Json:
        """Take a step as the only worker."""
        self._set_gradients([act])
        return self.step(act)

    def step_together(self, act: Json) -> Json:
        """Take a step with the mean of the workers' gradients."""
        contributions = sorted(act["contributions"], key=lambda each: each["worker"])
        self._set_gradients(contributions)
        return self.step(act)

    def end_epoch(self, act: Json) -> Json:
        """End an epoch, unless it has been."""
        if act.get("epoch") != self._epochs:
            if self._scheduler and self.spec["scheduler"].get("unit") == "EPOCHS":
                self._scheduler.step()
            self._epochs += 1
        return self.status

    def evaluate(self, act: Json) -> Json:
        """Compute the loss, what its gradient is, and how many predictions are right."""
        ((kind, arguments),) = self._loss.items()
        split = act.get("split")
        predictions, targets = to_torch(act["predictions"]), to_torch(act["targets"])
        predictions.requires_grad_()
        module = LOSSES[kind](**{name: _argument(value) for name, value in arguments.items()})
        with warnings.catch_warnings(category=UserWarning, action="ignore"):
            values = module(predictions, targets)  # KLDivLoss advises against its own default.
        loss = values.sum() if values.dim() else values
        (gradient,) = torch.autograd.grad(loss, predictions)
        found: Json = {
            "loss": loss.item(),
            "accuracy": accuracy_of(kind, arguments, predictions.detach(), targets),
            "steps": self._steps,
        }
        if split:
            counts = {"sequence": next(self._sequence), "split": split, "epochs": self._epochs}
            self._points.append(counts | found)
        return found | {
            "gradient": to_json(gradient) if act.get("gradient", split == "TRAIN") else None,
            "elements": to_json(values) if arguments.get("reduction") == "NONE" else None,
        }

    def list_points(self, act: Json) -> Json:
        """Read the history."""
        kept: list[Json] = []
        forgotten = 0
        for split in ("TRAIN", "VALIDATION"):
            points = [point for point in self._points if point["split"] == split]
            over = max(len(points) - self.spec.get("limits", {}).get("loss_points_max", 10**6), 0)
            if act.get("split") in (None, split):
                kept += points[over:]
                forgotten += over
        return {"points": sorted(kept, key=lambda point: point["sequence"]), "forgotten": forgotten}

    def kept(self) -> Json:
        """Return what a checkpoint's file has of the session."""
        tensors = {f"parameters/{name}": value for name, value in self._parameters.items()}
        numbers: Json = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
                elif value is not None:
                    numbers.setdefault(name, {})[key] = value
        written = [to_json(tensors[name], name) for name in sorted(tensors)]
        return {"tensors": written, "rates": self._rates(), "numbers": numbers}

    def update(self, act: Json) -> Json:
        """Change what the scenarios change in a running session; a schedule is not among it."""
        change = act["update"]
        everywhere = change.get("optimizer", {}).get(self._kind, {})
        own = {g["name"]: g["overrides"][self._kind] for g in change.get("groups", [])}
        self._base |= everywhere
        for group, described in zip(self._optimizer.param_groups, self._groups, strict=True):
            hyperparameters = everywhere | own.get(described["name"], {})
            group.update(hyperparameters)
            described["overrides"][self._kind] |= hyperparameters
        self._loss = change.get("loss", self._loss)
        self.spec |= {k: v for k, v in change.items() if k in ("display_name", "non_finite")}
        return self.describe(act)

    def _set_gradients(self, contributions: list[Json]) -> None:
        brought = [
            {
                tensor["name"]: self._wire.gradient(
                    each.get("worker", 0), tensor["name"], to_torch(tensor)
                )
                for tensor in each["gradients"]
            }
            for each in contributions
        ]
        for name, parameter in self._parameters.items():
            shares = [share[name] for share in brought if name in share]
            parameter.grad = sum(shares[1:], shares[0]) / len(brought) if shares else None

    def _in_force(self, given: Json) -> Json:
        # The one departure from torch's defaults: the fused update, where torch offers it.
        defaults = defaults_of(self._torch_class)
        fused = "fused" in inspect.signature(self._torch_class).parameters
        return defaults | ({"fused": not given.get("foreach")} if fused else {}) | given

    def _grouped(self, groups: list[Json]) -> list[Json]:
        named = {name for group in groups for name in group.get("parameters", [])}
        own = {group["name"]: group.get("overrides", {}).get(self._kind, {}) for group in groups}
        rest = [name for name in self._parameters if name not in named]
        members = {"default": rest} if rest else {}
        members |= {g["name"]: g["parameters"] for g in groups if g["name"] != "default"}
        return [
            {
                "name": name,
                "parameters": names,
                "overrides": {self._kind: self._base | own.get(name, {})},
            }
            for name, names in members.items()
        ]

    def _build_scheduler(self, given: Json | None) -> torch.optim.lr_scheduler.LRScheduler | None:
        if given is None:
            return None
        ((kind, arguments),) = ((k, v) for k, v in given.items() if k != "unit")
        if kind == "lambda_lr":
            count = len(self._groups)
            texts = arguments.get("group_lr_lambdas") or [arguments["lr_lambda"]] * count
            # The scenarios are ours, and their expressions are Python's too.
            arguments = {"lr_lambda": [eval(f"lambda epoch: {text}") for text in texts]}  # noqa: S307
        return SCHEDULERS[kind](self._optimizer, **arguments)

    def _rates(self) -> Json:
        groups = zip(self._groups, self._optimizer.param_groups, strict=True)
        return {described["name"]: float(group["lr"]) for described, group in groups}

    def _written(self, names: list[str]) -> list[Json]:
        return [to_json(self._parameters[name], name) for name in names]


ANSWERS: Mapping[str, Callable[[Session, Json], Json]] = {
    "get_session": Session.describe,
    "update_session": Session.update,
    "upload_parameters": Session.upload,
    "download_parameters": Session.download,
    "join": Session.join,
    "leave": Session.leave,
    "step": Session.step_alone,
    "round": Session.step_together,
    "end_epoch": Session.end_epoch,
    "evaluate_loss": Session.evaluate,
    "list_loss_points": Session.list_points,
}
"""What answers each act on a session."""


def accuracy_of(kind: str, arguments: Json, predictions: Tensor, targets: Tensor) -> float | None:
    """Return the share of right predictions; None where that means nothing."""
    if kind == "bce_loss" and bool(((targets == 0) | (targets == 1)).all()):
        return ((predictions >= 0.5) == (targets >= 0.5)).double().mean().item()
    if kind not in ("nll_loss", "cross_entropy_loss"):
        return None
    classes = targets.argmax(1) if targets.is_floating_point() else targets
    right = predictions.argmax(1) == classes
    return right[classes != arguments.get("ignore_index", -100)].double().mean().item()


def _value_of(parameter: Json) -> Tensor:
    if "data" in parameter or "pattern" in parameter:
        return to_torch(parameter)
    return torch.zeros_like(to_torch(parameter | {"pattern": _ZEROS}))


_ZEROS = {"multiply": 0, "add": 0, "modulo": 1, "subtract": 0, "divide": 1}


def _argument(value: Any) -> Any:  # noqa: ANN401 - whatever torch takes.
    if isinstance(value, str):
        return value.lower()
    return to_torch(value) if isinstance(value, dict) else value


def _entries(message: Descriptor, torch_classes: Mapping[str, type]) -> list[Json]:
    return [
        {
            "name": torch_classes[chosen.name].__name__,
            "field": chosen.name,
            "hyperparameters": [
                {"name": name, "default": _default_of(torch_classes[chosen.name], name)}
                for name in (chosen.message_type.fields_by_name if chosen.message_type else ())
            ],
        }
        for chosen in message.oneofs_by_name["kind"].fields
    ]


def _default_of(torch_class: type, name: str) -> str | None:
    if name in ("lr_lambda", "group_lr_lambdas"):
        return "null"  # Exactly one of the two is required.
    default = inspect.signature(torch_class).parameters[name].default
    if default is inspect.Parameter.empty:
        return None
    return json.dumps(default if name != "fused" else True)
