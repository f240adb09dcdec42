"""The product of a provider: one implementation over a case's own tensors."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.bench.cases import Inputs


class UnavailableError(RuntimeError):
    """A provider that cannot run here; the message is what its row says."""


@dataclass
class Built:
    """One implementation, ready to be called.

    forward: x [T, H] to y [T, H]; parameters: its leaf tensors, by the name of the parameter whose
    values each holds; activation: the one in its formula; checked: whether it computes an adapter,
    so that the parity gate applies; alone: the call that a limit makes in place of the case's mode;
    in_graph: whether a CUDA graph can hold it.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    activation: str = "gelu"
    checked: bool = True
    note: str = ""
    alone: Callable[[Tensor, Tensor], Callable[[], Any]] | None = None
    in_graph: bool = True


def share(linear: nn.Linear, inputs: Inputs, projection: str) -> None:
    """Give a linear layer the case's values of the projection "down" or "up"."""
    linear.weight = nn.Parameter(inputs.parameters[f"{projection}_weight"].detach())
    if linear.bias is not None:
        linear.bias = nn.Parameter(inputs.parameters[f"{projection}_bias"].detach())


def parameters_of(down: nn.Linear, up: nn.Linear) -> dict[str, Tensor]:
    """Return the parameters of two linear layers under their names here."""
    named = {"down_weight": down.weight, "up_weight": up.weight}
    named |= {"down_bias": down.bias} if down.bias is not None else {}
    return named | ({"up_bias": up.bias} if up.bias is not None else {})


def failure(error: Exception) -> tuple[str, str]:
    """Return (status, note) of a row whose measurement ended in this error."""
    if isinstance(error, UnavailableError | BackendUnsupportedError):
        return "unavailable", _sentence(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out_of_memory", _sentence(error)
    return "failed", _sentence(error)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    kinds = (UnavailableError, BackendUnsupportedError)
    return text if isinstance(error, kinds) else f"{type(error).__name__}: {text}"
