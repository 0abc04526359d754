"""A parameter of torch, and the host memory through which it travels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from optserve_client.tensors import BF16, Array

Stamp: TypeAlias = tuple[torch.Tensor | None, int]
"""A gradient, and how often torch had changed it in place."""

UNSTAMPED: Stamp = (None, 0)
"""Of no gradient."""


class Mirror:
    """A parameter, and the host memory through which it travels if it lives on another device."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter = parameter
        self._staging = None
        if parameter.device.type != "cpu":
            # Pinned, so that the copies to and from the GPU are as fast as the bus.
            self._staging = torch.empty(
                parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda
            )

    @property
    def is_cuda(self) -> bool:
        """Whether copies from it are still under way until its device has been waited for."""
        return self._parameter.is_cuda

    @property
    def is_trained(self) -> bool:
        """Whether a backward pass accumulates a gradient of it."""
        return self._parameter.is_leaf and self._parameter.requires_grad

    @property
    def has_plain_gradient(self) -> bool:
        """Whether it has a gradient, and one that can be sent as it is."""
        gradient = self._parameter.grad
        return (
            gradient is not None
            and gradient.layout == torch.strided
            and gradient.dtype == self._parameter.dtype
        )

    def watch(self, accumulated: Callable[[], None]) -> RemovableHandle:
        """Have ``accumulated`` called each time that a backward pass has added to the gradient."""
        handle: RemovableHandle = self._parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda _parameter: accumulated()
        )
        return handle

    def stamp(self) -> Stamp:
        """Return by what the gradient is known again."""
        gradient = self._parameter.grad
        return UNSTAMPED if gradient is None else (gradient, gradient._version)  # noqa: SLF001  (torch's own docs name it.)

    def has(self, stamp: Stamp) -> bool:
        """Return whether the gradient is the one of ``stamp``, unchanged as far as torch knows."""
        gradient, version = self.stamp()
        return gradient is stamp[0] and version == stamp[1]

    def values(self) -> Array:
        """Return the parameter's values, in host memory."""
        return self._to_host(self._parameter)

    def gradient(self) -> Array | None:
        """Return the parameter's gradient, in host memory; None if it has none."""
        gradient = self._parameter.grad
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise TypeError(f"a gradient is {gradient.layout}; make it dense with .to_dense()")
        return self._to_host(gradient)

    def start_gradient(self) -> tuple[Array, Callable[[], object]]:
        """Return the gradient, which there is, in host memory, and what waits for its values."""
        gradient = self.gradient()
        assert gradient is not None
        if not self.is_cuda:
            return gradient, _at_once
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._parameter.device))
        return gradient, copied.synchronize

    def write(self, values: Array) -> None:
        """Set the parameter's values in place, as an optimizer of torch does."""
        if self._staging is None:
            np.copyto(_array_of(self._parameter), values)  # copy: the session's to the parameter.
            # So that autograd knows, and refuses a backward pass through what was there before.
            torch.autograd.graph.increment_version(self._parameter)
        else:
            np.copyto(_array_of(self._staging), values)  # copy: the session's to pinned memory.
            with torch.no_grad():
                self._parameter.copy_(self._staging, non_blocking=True)  # copy: to the device.

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forget the gradient, or set it to zeros."""
        if set_to_none:
            self._parameter.grad = None
        elif self._parameter.grad is not None:
            self._parameter.grad = self._parameter.grad.detach().zero_()

    def _to_host(self, tensor: torch.Tensor) -> Array:
        if self._staging is None:
            return _array_of(tensor)
        self._staging.copy_(tensor.detach(), non_blocking=True)  # copy: device to pinned memory.
        return _array_of(self._staging)


def _array_of(tensor: torch.Tensor) -> Array:
    """Return the array that shares a CPU tensor's memory."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BF16)
    array: Array = tensor.numpy()
    return array


def _at_once() -> None:
    """Wait for nothing."""


def wait_for_devices(mirrors: Iterable[Mirror]) -> None:
    if any(mirror.is_cuda for mirror in mirrors):
        torch.cuda.synchronize()
