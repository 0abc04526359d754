"""What optimizers, schedulers and losses have in common: a class of torch, and its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from optserve_server.core.spec import Value


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Something that can be chosen by torch's name of it."""

    torch_class: type[Any]
    """Named as its message is in the contract."""
    not_offered: ClassVar[frozenset[str]] = frozenset()
    """Arguments of torch's constructors that make no sense over a wire."""

    @property
    def name(self) -> str:
        """Torch's name: ``Adam``."""
        return self.torch_class.__name__

    @cached_property
    def defaults(self) -> Mapping[str, Value | None]:
        """Torch's default of each argument on offer.

        None where torch has None, which it reads as "decide for yourself" or "nothing", and where
        it has no default, so that the argument is required.
        """
        return {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in inspect.signature(self.torch_class).parameters.items()
            if name not in self.not_offered
        }
