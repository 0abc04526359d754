"""A valid request of every method, in many forms: what nearly valid ones are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from messages import chunks_of, header_of, headers_of, message_of, messages_of
from parity.cases import OPTIMIZERS, SCHEDULERS
from scenarios.models import B_GROUP, gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import CrossEntropyLoss, Loss
from optserve.v1.optimizer_pb2 import SGD, Adam, Optimizer
from optserve.v1.session_pb2 import NON_FINITE_POLICY_ALLOW, SPLIT_TRAIN, ParameterGroup, Wire
from optserve.v1.tensor_pb2 import ENCODING_BF16, ENCODING_INT8_BLOCKS

SERVICE = pb.DESCRIPTOR.services_by_name["OptimizerService"]

CHECKPOINT = "best"
"""Name of the checkpoint that requests name."""

_PREDICTIONS, _TARGETS = torch.eye(4), torch.arange(4)
_CHOSEN_LOSS = Loss(cross_entropy_loss=CrossEntropyLoss())


def requests(session_id: str) -> Mapping[str, Sequence[Message]]:
    """Return requests by the name of their method.

    Args:
        session_id: Of a session of scenarios.models.model(), for those that name one.
    """
    named: dict[str, Sequence[Message]] = {
        "CreateSession": _creations(),
        "UpdateSession": _changes(session_id),
        "ListSessions": [
            pb.ListSessionsRequest(),
            pb.ListSessionsRequest(page_size=2, page_token="1"),
        ],
        "DownloadParameters": [
            pb.DownloadParametersRequest(session_id=session_id),
            pb.DownloadParametersRequest(session_id=session_id, names=["b"]),
        ],
        "UploadParameters": _uploads(session_id),
        "Train": _events(session_id),
        "Step": [
            pb.StepRequest(session_id=session_id, step=step, gradients=messages_of(gradients(step)))
            for step in (1, 2)
        ],
        "EndEpoch": [pb.EndEpochRequest(session_id=session_id, epoch=1)],
        "EvaluateLoss": [_evaluation(session_id)],
        "EvaluateLossStream": _evaluation_events(session_id),
        "ListLossPoints": [
            pb.ListLossPointsRequest(
                session_id=session_id, split=SPLIT_TRAIN, page_size=1, page_token="1"
            )
        ],
        "SaveCheckpoint": [pb.SaveCheckpointRequest(session_id=session_id, name=CHECKPOINT)],
        "RestoreCheckpoint": [
            pb.RestoreCheckpointRequest(session_id=session_id, name=CHECKPOINT, display_name="b")
        ],
        "DownloadCheckpoint": [
            pb.DownloadCheckpointRequest(session_id=session_id, name=CHECKPOINT)
        ],
        "DeleteCheckpoint": [pb.DeleteCheckpointRequest(session_id=session_id, name=CHECKPOINT)],
        "GetCatalogue": [pb.GetCatalogueRequest()],
        "GetServerInfo": [pb.GetServerInfoRequest()],
    }
    for method in SERVICE.methods:  # The others, and those that a later contract brings.
        if method.name not in named:
            named[method.name] = [_plainest(method.input_type, session_id)]
    return named


def _creations() -> list[Message]:
    """Return a session of each optimizer, of each scheduler, and of everything else there is."""
    plain = [
        spec(getattr(case.message(case.hyperparameters), arm))
        for case in OPTIMIZERS
        if (arm := case.message(case.hyperparameters).WhichOneof("kind"))
    ]
    scheduled = []
    for case in SCHEDULERS:
        if case is not None:
            scheduled.append(spec(SGD(lr=0.1), groups=[B_GROUP]))
            scheduled[-1].scheduler.CopyFrom(case.message(groups=2))
    full = spec(Adam(lr=0.1), groups=[B_GROUP], loss=CrossEntropyLoss(), workers=2)
    full.display_name, full.non_finite = "a name", NON_FINITE_POLICY_ALLOW
    full.wire.CopyFrom(Wire(gradients=ENCODING_BF16, parameters=ENCODING_INT8_BLOCKS))
    full.limits.loss_points_max, full.limits.round_timeout_s = 3, 0.5
    return [
        pb.CreateSessionRequest(spec=each, values=messages_of(model()))
        for each in [*plain, *scheduled, full]
    ]


def _changes(session_id: str) -> list[Message]:
    adam = Optimizer(adam=Adam(lr=0.2, weight_decay=0.1))
    group = ParameterGroup(name="bias", overrides=Optimizer(adam=Adam(lr=0.3)))
    return [
        pb.UpdateSessionRequest(session_id=session_id, optimizer=adam, groups=[group]),
        pb.UpdateSessionRequest(session_id=session_id, loss=_CHOSEN_LOSS, display_name="another"),
    ]


def _uploads(session_id: str) -> list[Message]:
    begin = pb.UploadBegin(session_id=session_id, parameters=headers_of(model()))
    return [
        pb.UploadParametersRequest(begin=begin),
        *(pb.UploadParametersRequest(chunks=each) for each in chunks_of(model().values())),
    ]


def _events(session_id: str) -> list[Message]:
    """Return events of a stream that takes two steps, one in each form."""
    whole = [*chunks_of(gradients(1).values())]
    packed = [message_of(each).data for each in gradients(2).values()]
    return [
        pb.TrainRequest(open=pb.TrainOpen(session_id=session_id)),
        pb.TrainRequest(begin=pb.StepBegin(step=1, gradients=headers_of(gradients(1)))),
        *(pb.TrainRequest(chunks=each) for each in whole),
        pb.TrainRequest(end=pb.StepEnd()),
        pb.TrainRequest(begin=pb.StepBegin(step=2, every_parameter=True)),
        pb.TrainRequest(packed=pb.PackedStep(step=2, gradients=packed)),
        pb.TrainRequest(shared=pb.SharedStep(step=2, absent=[1])),
    ]


def _evaluation(session_id: str) -> Message:
    return pb.EvaluateLossRequest(
        session_id=session_id,
        split=SPLIT_TRAIN,
        gradient=True,
        predictions=message_of(_PREDICTIONS),
        targets=message_of(_TARGETS),
    )


def _evaluation_events(session_id: str) -> list[Message]:
    begin = pb.LossBegin(
        session_id=session_id,
        predictions=header_of("predictions", _PREDICTIONS),
        targets=header_of("targets", _TARGETS),
    )
    return [
        pb.EvaluateLossStreamRequest(begin=begin),
        *(
            pb.EvaluateLossStreamRequest(chunks=each)
            for each in chunks_of([_PREDICTIONS, _TARGETS])
        ),
    ]


def _plainest(message: Descriptor, session_id: str) -> Message:
    """Return a request that says no more than which session it is about."""
    request = GetMessageClass(message)()
    if "session_id" in message.fields_by_name:
        request.session_id = session_id  # type: ignore[attr-defined] # It has: see above.
    return request
