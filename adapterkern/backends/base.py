"""The contract of a backend: what it declares, what it computes, and how it says no."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from adapterkern.spec import AdapterCall, AdapterSpec, name_of


class BackendUnsupportedError(RuntimeError):
    """A named backend cannot run a call, or ADAPTERKERN_STRICT=1 forbids a fallback."""


class Needs(NamedTuple):
    """Which gradients are asked for; the fields of `Gradients`."""

    x: bool
    down_weight: bool
    up_weight: bool
    down_bias: bool
    up_bias: bool
    scaling: bool


class Gradients(NamedTuple):
    """Gradients of one call, each in its tensor's dtype and shape; None where not asked for."""

    x: Tensor | None = None
    down_weight: Tensor | None = None
    up_weight: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scaling: Tensor | None = None


class Backend(ABC):
    """One implementation of the operation. Subclasses declare capabilities as class attributes.

    A capability that is not declared is a reason to decline, so a feature new to
    `AdapterCall.features()` is safe in every backend from the first day.
    """

    name: ClassVar[str]
    devices: ClassVar[frozenset[str]]
    dtypes: ClassVar[frozenset[torch.dtype]]
    activations: ClassVar[frozenset[str]]
    features: ClassVar[frozenset[str]]

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run anything in this process; None if it can."""

    def unsupported_reasons(self, spec: AdapterSpec) -> list[str]:
        """Every reason why this backend cannot run `spec`, empty if it can."""
        unavailable = self.unavailable_reason()
        reasons = [] if unavailable is None else [unavailable]
        if spec.device.type not in self.devices:
            reasons.append(
                f"device {spec.device.type} is not supported (has: {_listed(self.devices)})"
            )
        if spec.activation not in self.activations:
            reasons.append(
                f'activation "{spec.activation}" is not implemented '
                f"(has: {_listed(self.activations)})"
            )
        dtypes = {spec.compute_dtype, *(dtype for _, dtype in spec.dtypes)}
        for dtype in sorted(dtypes - self.dtypes, key=name_of):
            reasons.append(
                f"dtype {name_of(dtype)} is not supported "
                f"(has: {_listed(map(name_of, self.dtypes))})"
            )
        for feature in sorted(spec.features - self.features):
            reasons.append(
                f'feature "{feature}" is not implemented (has: {_listed(self.features)})'
            )
        return reasons + self.limits(spec)

    def limits(self, spec: AdapterSpec) -> list[str]:
        """Reasons beyond the declarations, such as sizes that do not fit this device."""
        return []

    @abstractmethod
    def forward(self, call: AdapterCall, save_z: bool) -> tuple[Tensor, Tensor]:
        """(y, z): the output [..., H], contiguous, in `call.output_dtype`, and the pre-activation
        [T, R] in `call.compute_dtype` (size 0 unless `save_z`).
        """

    @abstractmethod
    def backward(
        self, call: AdapterCall, z: Tensor, grad_output: Tensor, needs: Needs
    ) -> Gradients:
        """The gradients in `needs`, from the saved pre-activation and the gradient of y."""


def rows(tensor: Tensor) -> Tensor:
    """[T, H] with unit stride across: a view where the strides allow it, else one copy."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def packed(tensor: Tensor | None) -> Tensor | None:
    """A parameter without gaps, where there is one."""
    return None if tensor is None else tensor.contiguous()


def allow_tf32() -> bool:
    """Whether torch's settings let float32 matrix products run in TF32
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.allow_tf32`, or the newer
    `fp32_precision`).
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # torch < 2.9
        return matmul.allow_tf32
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "ieee")
    return precision == "tf32"


def _listed(names) -> str:
    return ", ".join(sorted(names))
