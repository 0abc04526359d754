"""OptimizerService: each call is decode, core, encode."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import torch

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceServicer
from optserve_server import __version__
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.tenant import TenantRegistry
from optserve_server.rpc import (
    access,
    change,
    checkpoints,
    create,
    decode,
    encode,
    evaluate,
    parameters,
    shared_memory,
    step,
    train,
)
from optserve_server.rpc.catalogue import catalogue

_Context = grpc.aio.ServicerContext[Any, Any]

_LOGGER = logging.getLogger(__name__)
_PAGE_SESSIONS_MAX = 100
_DURABILITY = "durability"  # Name among the server's features: sessions may survive.
_PAGE_POINTS_MAX = 10_000  # About 50 bytes each: an eighth of a message.


class OptimizerServicer(OptimizerServiceServicer):
    """The service over a registry of sessions. What a method raises, the Boundary translates.

    Methods that answer with a stream write to their context instead of yielding, so that a client
    that does not read can be let go in time.
    """

    def __init__(self, registry: SessionRegistry) -> None:
        """Serve ``registry``."""
        self._registry = registry
        self._limits = registry.limits
        self._catalogue = catalogue()

    async def CreateSession(
        self, request: pb.CreateSessionRequest, context: _Context
    ) -> pb.CreateSessionResponse:
        """Create a session, with values for its parameters if they came along."""
        actor = await create.create(request, self._sessions())
        return pb.CreateSessionResponse(session=encode.session(actor))

    async def GetSession(
        self, request: pb.GetSessionRequest, context: _Context
    ) -> pb.GetSessionResponse:
        """Say where a session stands."""
        return pb.GetSessionResponse(
            session=encode.session(await self._sessions().find(request.session_id))
        )

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: _Context
    ) -> pb.ListSessionsResponse:
        """List the sessions, the oldest first."""
        after, count = decode.page(request.page_size, request.page_token, _PAGE_SESSIONS_MAX)
        sessions, next_after = await self._sessions().page(after=after, count=count)
        return pb.ListSessionsResponse(
            sessions=[encode.session_status(session) for session in sessions],
            next_page_token="" if next_after is None else str(next_after),
        )

    async def UpdateSession(
        self, request: pb.UpdateSessionRequest, context: _Context
    ) -> pb.UpdateSessionResponse:
        """Change a running session."""
        actor = await change.update(request, self._sessions())
        return pb.UpdateSessionResponse(session=encode.session(actor))

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: _Context
    ) -> pb.DeleteSessionResponse:
        """Forget a session."""
        session = await self._sessions().delete(request.session_id)
        status = encode.session_status(session)
        _LOGGER.info("session deleted", extra={"session": status.session_id, "steps": status.steps})
        return pb.DeleteSessionResponse(status=status)

    async def UploadParameters(
        self, request_iterator: AsyncIterator[pb.UploadParametersRequest], context: _Context
    ) -> pb.UploadParametersResponse:
        """Set values of parameters."""
        actor = await parameters.upload(request_iterator, self._sessions())
        return pb.UploadParametersResponse(status=encode.session_status(actor))

    async def DownloadParameters(  # type: ignore[override] # writes by its context
        self, request: pb.DownloadParametersRequest, context: _Context
    ) -> None:
        """Send values of parameters."""
        await parameters.download(request, context, self._sessions())

    async def Train(  # type: ignore[override] # writes by its context
        self, request_iterator: AsyncIterator[pb.TrainRequest], context: _Context
    ) -> None:
        """Serve one worker's stream."""
        await train.train(request_iterator, context, self._sessions())

    async def Step(self, request: pb.StepRequest, context: _Context) -> pb.StepResponse:
        """Take a step that came in one message."""
        return await step.step(request, self._sessions())

    async def GetContribution(
        self, request: pb.GetContributionRequest, context: _Context
    ) -> pb.GetContributionResponse:
        """Say what became of a worker's last step."""
        actor = await self._sessions().find(request.session_id)
        return encode.contribution_response(actor, actor.last_contribution(request.worker))

    async def EndEpoch(self, request: pb.EndEpochRequest, context: _Context) -> pb.EndEpochResponse:
        """End an epoch."""
        actor = await self._sessions().find(request.session_id)
        async with actor.writing() as session:
            await actor.make(lambda: session.end_epoch(request.epoch))
        return pb.EndEpochResponse(status=encode.session_status(actor))

    async def EvaluateLoss(
        self, request: pb.EvaluateLossRequest, context: _Context
    ) -> pb.EvaluateLossResponse:
        """Compute the loss of what came in one message."""
        return await evaluate.evaluate(request, self._sessions())

    async def EvaluateLossStream(  # type: ignore[override] # writes by its context
        self, request_iterator: AsyncIterator[pb.EvaluateLossStreamRequest], context: _Context
    ) -> None:
        """Compute the loss of what comes in chunks."""
        await evaluate.evaluate_stream(request_iterator, context, self._sessions())

    async def ListLossPoints(
        self, request: pb.ListLossPointsRequest, context: _Context
    ) -> pb.ListLossPointsResponse:
        """Read a session's history."""
        actor = await self._sessions().find(request.session_id)
        after, count = decode.page(request.page_size, request.page_token, _PAGE_POINTS_MAX)
        page = actor.session.history.page(decode.split(request.split), after=after, count=count)
        return pb.ListLossPointsResponse(
            points=[encode.loss_point(point) for point in page.points],
            forgotten=page.forgotten,
            next_page_token=str(page.points[-1].sequence) if page.more else "",
        )

    async def SaveCheckpoint(
        self, request: pb.SaveCheckpointRequest, context: _Context
    ) -> pb.SaveCheckpointResponse:
        """Save a session under a name."""
        return await checkpoints.save(request, self._sessions())

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: _Context
    ) -> pb.ListCheckpointsResponse:
        """List checkpoints, the oldest first."""
        return await checkpoints.page(request, self._sessions())

    async def RestoreCheckpoint(
        self, request: pb.RestoreCheckpointRequest, context: _Context
    ) -> pb.RestoreCheckpointResponse:
        """Make a session that goes on from a checkpoint."""
        actor = await checkpoints.restore(request, self._sessions())
        return pb.RestoreCheckpointResponse(session=encode.session(actor))

    async def DownloadCheckpoint(  # type: ignore[override] # writes by its context
        self, request: pb.DownloadCheckpointRequest, context: _Context
    ) -> None:
        """Send a checkpoint as a file."""
        await checkpoints.download(request, context, self._sessions())

    async def DeleteCheckpoint(
        self, request: pb.DeleteCheckpointRequest, context: _Context
    ) -> pb.DeleteCheckpointResponse:
        """Delete a checkpoint."""
        return await checkpoints.delete(request, self._sessions())

    async def GetCatalogue(
        self, request: pb.GetCatalogueRequest, context: _Context
    ) -> pb.GetCatalogueResponse:
        """List everything that can be chosen."""
        return self._catalogue

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: _Context
    ) -> pb.GetServerInfoResponse:
        """Say what the server is."""
        device, limits = self._registry.surroundings.device, self._limits
        names = [field.name for field in pb.Limits.DESCRIPTOR.fields]
        return pb.GetServerInfoResponse(
            version=__version__,
            torch_version=str(torch.__version__),
            device=str(device.torch),
            device_name=device.name,
            features=self._features(),
            limits=pb.Limits(**{name: getattr(limits, name) for name in names}),
        )

    def _features(self) -> list[str]:
        surroundings = self._registry.surroundings
        found = {
            shared_memory.FEATURE: surroundings.shared_memory,
            _DURABILITY: surroundings.persistence is not None,
        }
        return [feature for feature, is_there in found.items() if is_there]

    def _sessions(self) -> TenantRegistry:
        """Return what the caller has of the registry."""
        return self._registry.of(access.tenant())
