"""The Python client of optserve, an optimizer as a service.

A server keeps the parameters, the optimizer's state and the schedule; a client sends gradients and
receives parameters.
NumPy arrays go in and come out, torch is not needed::

    import optserve_client as optserve

    with optserve.connect("localhost:50051") as client:
        with client.create_session({"w": w}, optimizer=optserve.optim.Adam(lr=1e-3)) as session:
            session.step({"w": gradient_at(session.parameters["w"])})

``optserve_client.aio`` has the same for asyncio, ``optserve_client.torch`` an optimizer for a torch
training loop.
"""

from __future__ import annotations

from importlib.metadata import version

from optserve_client import lr_scheduler, nn, optim
from optserve_client._spec import (
    Durability,
    DurabilityMode,
    ParameterGroup,
    Placeholder,
    ScheduleUnit,
    SessionOptions,
    UpdateOptions,
    Via,
    Wire,
    WireEncoding,
)
from optserve_client.client import Client, connect
from optserve_client.config import ClientConfig, Lane, Retry, Tls, Token
from optserve_client.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ClosedError,
    DataTypeMismatchError,
    DeadlineError,
    EpochEmptyError,
    EpochOutOfOrderError,
    InternalError,
    InvalidExpressionError,
    InvalidFieldError,
    InvalidHyperparameterError,
    InvalidNameError,
    JournalForeignError,
    LimitError,
    LossNotSetError,
    NoGradientError,
    NonFiniteGradientError,
    NoStorageError,
    OptserveError,
    ParametersNotSetError,
    ProtocolError,
    RequestConflictError,
    RequestError,
    RoundTimeoutError,
    ScheduleFailedError,
    SeatTakenOverError,
    ServiceError,
    SessionDamagedError,
    SessionDeletedError,
    SessionError,
    SessionFailedError,
    SessionNotFoundError,
    ShapeMismatchError,
    SharedMemoryError,
    StalledError,
    StepConflictError,
    StepOutOfOrderError,
    StepsLostError,
    StepUnknownError,
    TargetOutOfRangeError,
    UnauthenticatedError,
    UnavailableError,
    UnknownNameError,
    WorkerBusyError,
)
from optserve_client.progress import ProgressCallback, TransferProgress
from optserve_client.results import (
    Contribution,
    LossHistory,
    LossPoint,
    LossResult,
    Parameters,
    Split,
    StepResult,
)
from optserve_client.session import Session
from optserve_client.tensors import BF16, from_bfloat16, tensor, to_bfloat16

__version__ = version("optserve-client")

__all__ = [
    "BF16",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "Client",
    "ClientConfig",
    "ClosedError",
    "Contribution",
    "DataTypeMismatchError",
    "DeadlineError",
    "Durability",
    "DurabilityMode",
    "EpochEmptyError",
    "EpochOutOfOrderError",
    "InternalError",
    "InvalidExpressionError",
    "InvalidFieldError",
    "InvalidHyperparameterError",
    "InvalidNameError",
    "JournalForeignError",
    "Lane",
    "LimitError",
    "LossHistory",
    "LossNotSetError",
    "LossPoint",
    "LossResult",
    "NoGradientError",
    "NoStorageError",
    "NonFiniteGradientError",
    "OptserveError",
    "ParameterGroup",
    "Parameters",
    "ParametersNotSetError",
    "Placeholder",
    "ProgressCallback",
    "ProtocolError",
    "RequestConflictError",
    "RequestError",
    "Retry",
    "RoundTimeoutError",
    "ScheduleFailedError",
    "ScheduleUnit",
    "SeatTakenOverError",
    "ServiceError",
    "Session",
    "SessionDamagedError",
    "SessionDeletedError",
    "SessionError",
    "SessionFailedError",
    "SessionNotFoundError",
    "SessionOptions",
    "ShapeMismatchError",
    "SharedMemoryError",
    "Split",
    "StalledError",
    "StepConflictError",
    "StepOutOfOrderError",
    "StepResult",
    "StepUnknownError",
    "StepsLostError",
    "TargetOutOfRangeError",
    "Tls",
    "Token",
    "TransferProgress",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownNameError",
    "UpdateOptions",
    "Via",
    "Wire",
    "WireEncoding",
    "WorkerBusyError",
    "connect",
    "from_bfloat16",
    "lr_scheduler",
    "nn",
    "optim",
    "tensor",
    "to_bfloat16",
]
