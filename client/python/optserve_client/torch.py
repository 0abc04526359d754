"""An optimizer for a torch training loop whose step happens on a server.

::

    with optserve_client.connect("localhost:50051") as client:
        adam = optserve_client.optim.Adam(lr=1e-3)
        with RemoteOptimizer(model.named_parameters(), client, optimizer=adam) as optimizer:
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss_function(model(inputs), targets).backward()
                optimizer.step()  # sends .grad, and writes the new values into the parameters

This is the only module that imports torch, but for the private ones that it stands on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack

import torch

from optserve.v1.session_pb2 import SessionStatus
from optserve_client._backward import Backward
from optserve_client._mirror import Mirror, wait_for_devices
from optserve_client._spec import ParameterGroup, SessionOptions
from optserve_client.client import Client
from optserve_client.optim import AnyOptimizer
from optserve_client.results import StepResult
from optserve_client.session import Session

__all__ = ["RemoteOptimizer"]

Named: TypeAlias = tuple[str, torch.Tensor]
"""What ``model.named_parameters()`` gives, one by one."""

Group: TypeAlias = Mapping[str, Any]
"""As torch has them: ``{"params": named parameters, "lr": 0.01}``, with a ``name`` if you like."""


class RemoteOptimizer:
    """The optimizer of a session, in the place of one of torch's.

    As a context manager it is closed at the end of the block.
    """

    def __init__(
        self,
        params: Iterable[Named | Group],
        client: Client,
        *,
        overlap_backward: bool = False,
        **options: Unpack[SessionOptions],
    ) -> None:
        """Create a session with the parameters' values; it is deleted when this is closed.

        Args:
            params: ``model.named_parameters()``, or groups of named parameters with hyperparameters
                of their own. FP32, FP64, FP16 or BF16, on any device; nothing is converted.
            client: Of the server.
            overlap_backward: Whether to send each gradient as soon as the backward pass has it,
                while it computes the others. For loops with one backward pass for each step, and
                nothing between the two that changes gradients; see ``steps_given_up``. What changes
                them behind torch's back, through ``grad.data`` or NumPy, or as GradScaler and
                DistributedDataParallel do, is not noticed, and the step is one with what was sent.
            options: As of ``Client.create_session``.

        Raises:
            TypeError: Parameters have no names.
            ValueError: A name, or a parameter, stands twice, or a group has an unknown key.
            RequestError: The server refuses something in it.
        """
        parameters, groups = _read(params, options["optimizer"])
        self._mirrors = {name: Mirror(parameter) for name, parameter in parameters.items()}
        values = {name: mirror.values() for name, mirror in self._mirrors.items()}
        wait_for_devices(self._mirrors.values())
        options["groups"] = [*options.get("groups", ()), *groups]
        self._session = client.create_session(values, **options)
        self._backward = Backward(self._mirrors, self._session) if overlap_backward else None

    @classmethod
    def join(
        cls,
        params: Iterable[Named],
        client: Client,
        session_id: str,
        *,
        worker: int,
        overlap_backward: bool = False,
    ) -> Self:
        """Take part in a session that another worker has created, and load its values.

        Args:
            params: ``model.named_parameters()`` of the same model.
            client: Of the server.
            session_id: Of the session; it lives on when this is closed.
            worker: Which of its workers to be, from 0.
            overlap_backward: As for one that is created.

        Raises:
            ValueError: The session's parameters are not these.
        """
        parameters = _take(params, {})
        session = client.join_session(session_id, worker=worker)
        if session.parameters.keys() != parameters.keys():
            session.close()
            raise ValueError("the session's parameters have other names than the model's")
        self = cls.__new__(cls)
        self._mirrors = {name: Mirror(parameter) for name, parameter in parameters.items()}
        self._session = session
        self._backward = Backward(self._mirrors, session) if overlap_backward else None
        self._write()
        return self

    @property
    def session(self) -> Session:
        """The session: its status, its loss, its learning rates. Its steps are this optimizer's."""
        return self._session

    @property
    def steps_given_up(self) -> int:
        """How often gradients were sent during a backward pass in vain.

        Because a backward pass failed, or was not the only one before its step; because a parameter
        had no gradient; or because gradients were changed after the backward pass, as clipping them
        does. Such a step is taken with the gradients as they are when ``step`` is called: its
        result is the same, and it takes longer than without ``overlap_backward``.
        """
        return self._backward.given_up if self._backward else 0

    def step(self) -> StepResult:
        """Send every parameter's ``.grad``, and write the new values into the parameters.

        A ``.grad`` that is None is no gradient, as for torch: the parameter stays as it is.

        Raises:
            OptserveError: As of ``Session.step``; no parameter was changed.
        """
        result = self._backward.finish_step() if self._backward else None
        if result is None:
            gradients = {name: mirror.gradient() for name, mirror in self._mirrors.items()}
            wait_for_devices(self._mirrors.values())
            result = self._session.step(gradients)
        self._write()
        return result

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget every parameter's gradient, or set it to zeros."""
        if self._backward:
            self._backward.give_up()
        for mirror in self._mirrors.values():
            mirror.zero_grad(set_to_none=set_to_none)

    def resume(self) -> int:
        """Go on from where the session stands: write its values into the parameters.

        After a StepsLostError, or in the place of another worker; see ``Session.resume``.

        Returns:
            How many steps have been applied: the next data is that of the step after them.
        """
        if self._backward:
            self._backward.give_up()
        self._session.resume()
        self._write()
        return self._session.steps

    def end_epoch(self) -> SessionStatus:
        """End an epoch: a scheduler that counts epochs advances."""
        return self._session.end_epoch()

    def close(self) -> None:
        """Delete the session if it was created here, else leave it. May be called again."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._backward:
                self._backward.close()
        finally:
            self._session.__exit__(kind, error, traceback)

    def _write(self) -> None:
        for name, values in self._session.parameters.items():
            self._mirrors[name].write(values)


def _read(
    params: Iterable[Named | Group], optimizer: AnyOptimizer
) -> tuple[dict[str, torch.Tensor], list[ParameterGroup]]:
    """Return the parameters by name, and the groups that they were given in."""
    items = list(params)
    if not any(isinstance(item, Mapping) for item in items):
        return _take(items, {}), []
    parameters: dict[str, torch.Tensor] = {}
    groups: list[ParameterGroup] = []
    for number, group in enumerate(items):
        if not isinstance(group, Mapping):
            raise TypeError("parameters are given in groups, or none of them is")
        overrides = {key: group[key] for key in group if key not in {"params", "name"}}
        taken = _take(group["params"], parameters)
        parameters |= taken
        groups.append(
            ParameterGroup(
                name=group.get("name", f"group{number}"),
                parameters=list(taken),
                overrides=type(optimizer)(**overrides) if overrides else None,
            )
        )
    return parameters, groups


def _take(params: Iterable[object], before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return named parameters by name; none of them may have come before."""
    taken: dict[str, torch.Tensor] = {}
    seen = {id(parameter) for parameter in before.values()}
    for item in params:
        match item:
            case (str() as name, torch.Tensor() as parameter):
                if name in before or name in taken or id(parameter) in seen:
                    raise ValueError(f"parameter {name!r} stands twice")
                taken[name] = parameter
                seen.add(id(parameter))
            case _:
                raise TypeError("parameters need names: pass model.named_parameters()")
    return taken
