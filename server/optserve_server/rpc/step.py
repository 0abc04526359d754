"""Step: one worker's contribution to one step, in one message each way."""

from __future__ import annotations

import time
from collections.abc import Sequence

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import Tensor
from optserve.wire import whole
from optserve_server.core.actor import SessionActor
from optserve_server.core.errors import LimitExceededError
from optserve_server.core.events import Direction, Phase
from optserve_server.core.round import Contribution
from optserve_server.core.spec import Encoding
from optserve_server.core.tenant import TenantRegistry
from optserve_server.core.tensors import TensorSpec
from optserve_server.rpc import decode, encode, encoded

_TAG_BYTES = 16  # At most, around the data of one tensor: tags and lengths.
_RESULT_BYTES = 64  # At most, of a result's numbers.


async def step(request: pb.StepRequest, registry: TenantRegistry) -> pb.StepResponse:
    """Take a step that came in one message.

    Raises:
        OptserveError: It cannot be taken. Nothing was changed.
    """
    limits, observer = registry.limits, registry.surroundings.observer
    registry.check_accepting()
    actor = await registry.find(request.session_id)
    _check_answer_fits(actor, limits.message_bytes_max)
    decode.check_tensor_count(len(request.gradients), limits, "gradients")
    specs = decode.tensor_specs([each.header for each in request.gradients], limits, "gradients")
    digest = decode.digest(request.digest, limits)
    with actor.attach(request.worker):
        started = time.perf_counter()
        contribution = actor.begin(request.worker, request.step, specs, digest)
        count = _fill(contribution, request, specs, actor.spec.wire.gradients)
        observer.phase_ended(Phase.RECEIVE, time.perf_counter() - started)
        observer.bytes_moved(Direction.RECEIVED, count)
        outcome, replayed = await actor.commit(contribution)
        started = time.perf_counter()
        async with actor.reading() as parameters:
            sources = encoded.ParameterSources(_without_stream(actor.spec.wire.parameters))
            named = zip(actor.spec.parameters, sources.of(parameters), strict=True)
            response = pb.StepResponse(
                result=encode.step_result(outcome, replayed=replayed),
                parameters=[
                    Tensor(header=encode.tensor_header(spec), data=whole(source))
                    for spec, source in named
                ],
                encoding=sources.encoding,
            )
        observer.phase_ended(Phase.SEND, time.perf_counter() - started)
        observer.bytes_moved(Direction.SENT, sum(len(each.data) for each in response.parameters))
        return response


def _check_answer_fits(actor: SessionActor, message_bytes_max: int) -> None:
    """Make sure that the answer fits into a message, before the step is made."""
    specs = actor.spec.parameters
    empty = pb.StepResponse(
        result=pb.StepResult(rates=encode.group_rates(actor.view.rates)),
        parameters=[Tensor(header=encode.tensor_header(spec)) for spec in specs],
    )
    count = empty.ByteSize() + sum(spec.byte_count + _TAG_BYTES for spec in specs) + _RESULT_BYTES
    if count > message_bytes_max:
        raise LimitExceededError(
            f"the answer would have {count} bytes; use Train",
            expected=f"at most {message_bytes_max} bytes",
            actual=f"{count} bytes",
        )


def _without_stream(encoding: Encoding) -> Encoding:
    """Return how parameters leave where there is no answer before to which they could differ."""
    return Encoding.PLAIN if encoding is Encoding.INT8_BLOCKS else encoding


def _fill(
    contribution: Contribution,
    request: pb.StepRequest,
    specs: Sequence[TensorSpec],
    encoding: Encoding,
) -> int:
    """Copy the message's gradients to where the contribution wants them.

    Return how many bytes they are.
    """
    if contribution.settled is None:  # Else nobody looks at them: they may have been left out.
        targets = encoded.GradientTargets(encoding).of(contribution.targets)
        for i, (spec, gradient) in enumerate(zip(specs, request.gradients, strict=True)):
            decode.check_byte_count(spec, len(gradient.data), f"gradients[{i}].data", encoding)
        for target, gradient in zip(targets, request.gradients, strict=True):
            target.write(0, memoryview(gradient.data))
    return sum(len(gradient.data) for gradient in request.gradients)
