"""Adapters that the layer they follow leaves to the block around it."""

import threading
from types import TracebackType

from torch import nn


class _Current(threading.local):
    """The adapter that is left out just now, in each thread apart: another may run the same layer
    in the ordinary way."""

    adapter: nn.Module | None = None


_current = _Current()


class deferred:
    """While this is open, the layer that `adapter` follows returns what it would have adapted.

    The block around the layer then runs the adapter itself, together with its residual add and its
    norm. A state of the thread, and not an argument, since the layer is called deep inside of an
    attention that passes nothing on. It is closed by exceptions too, and what is recomputed under
    checkpoints opens it again, because the block itself is what they recompute. torch.compile
    traces it. None defers nothing.
    """

    def __init__(self, adapter: nn.Module | None) -> None:
        self.adapter = adapter
        self.before: nn.Module | None = None

    def __enter__(self) -> None:
        self.before = _current.adapter
        _current.adapter = self.adapter

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _current.adapter = self.before


def is_deferred(adapter: nn.Module) -> bool:
    """Whether the block around the layer runs this adapter."""
    return _current.adapter is adapter
