"""The contract of a backend: what it declares, what it computes, and how it says no."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from adapterkern.grouped.call import GroupedCall, GroupedGradients, GroupedNeeds
from adapterkern.grouped.call import tensor_values as grouped_tensor_values
from adapterkern.results import Gradients, Needs, Outputs, Saved, added_gradients
from adapterkern.spec import (
    NORM_NAMES,
    AdapterCall,
    AdapterSpec,
    has_values,
    shape_of,
    tensor_values,
)
from adapterkern.validation import name_of

# All backends have these; a backend adds the name of a later feature once its kernels have it.
FIRST_FEATURES = frozenset(
    {"bias", "input_residual", "external_residual", "skip", "scaling", "learned_scaling"}
    | {"mixed_dtypes"}
)
NORM_FEATURES = frozenset(NORM_NAMES)
# Of the op of many adapters alone.
GROUPED_FEATURES = frozenset({"ranks", "gradient"})


class BackendUnsupportedError(RuntimeError):
    """A named backend cannot run a call, or ADAPTERKERN_STRICT=1 forbids a fallback."""


class Backend(ABC):
    """One implementation of the operation. Subclasses declare capabilities as class attributes.

    A capability that is not declared is a reason to decline, so an operation that is new, or a
    feature new to `AdapterCall.features()`, is safe in every backend from the first day.
    """

    name: ClassVar[str]
    operations: ClassVar[frozenset[str]] = frozenset({"bottleneck_adapter"})
    devices: ClassVar[frozenset[str] | None]  # by type; None: wherever PyTorch runs
    dtypes: ClassVar[frozenset[torch.dtype]]
    activations: ClassVar[frozenset[str]]
    features: ClassVar[frozenset[str]]
    most_routed_slots: ClassVar[int] = 0  # up to how many `route` sorts tokens on its devices

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run anything in this process; None if it can."""

    def unsupported_reasons(self, spec: AdapterSpec) -> list[str]:
        """Every reason why this backend cannot run `spec`, empty if it can."""
        unavailable = self.unavailable_reason()
        reasons = [] if unavailable is None else [unavailable]
        if spec.operation not in self.operations:
            reasons.append(
                f"operation {spec.operation} is not implemented (has: {_listed(self.operations)})"
            )
        if self.devices is not None and spec.device.type not in self.devices:
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
    def forward(self, call: AdapterCall, save: bool) -> tuple[Outputs, Saved]:
        """The outputs, and with `save` what the backward needs of them.

        With a norm, y is None unless `keeps_sum`.
        """

    @abstractmethod
    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        """The gradients in `needs`, from what forward saved and the gradients of its outputs.

        `call` may lack tensors that are added to the sum, and biases, and have outlines in place of
        tensors whose values are not needed (`spec.has_values`); z is there if `needs.z`.

        With a norm, `upstream.normed` is there, and `saved` has the stream and its statistics if
        `needs.stream`; the gradients of residual and skip may be one tensor.
        """

    def grouped_forward(self, call: GroupedCall, save: bool) -> tuple[Tensor, Tensor | None]:
        """y, contiguous, and with `save` z as `empty_units` makes it, in the order of the tokens.

        z is zero where a token has no adapter, and in units beyond the rank of its slot. Such units
        of the weights and biases, and slots of rank 0, are not read: they may hold NaN.
        """
        raise NotImplementedError(self.name)

    def grouped_backward(
        self, call: GroupedCall, z: Tensor | None, dy: Tensor, needs: GroupedNeeds
    ) -> GroupedGradients:
        """The gradients in `needs`, as `GroupedGradients` describes them.

        `call` is as `GroupedCall.for_backward` makes it; z is there if `needs.z`; dy has the shape
        and dtype of y and any strides.
        """
        raise NotImplementedError(self.name)

    def route(self, ids: Tensor, buffers: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Fill the buffers of an `AdapterRouting` for ids [T] int32, as `sort_tokens` does."""
        raise NotImplementedError(self.name)


def empty_outputs(call: AdapterCall, save: bool) -> tuple[Outputs, Saved]:
    """Room for what a forward writes, contiguous whatever the strides of the inputs are."""
    x, dtype = call.x, call.output_dtype
    y = x.new_empty(x.shape, dtype=dtype) if keeps_sum(call, save) else None
    z = empty_units(call, call.num_tokens) if save else None
    if call.norm == "none":
        return Outputs(y), Saved(z)
    outputs = Outputs(y, x.new_empty(x.shape, dtype=call.normed_dtype))
    if not save:
        return outputs, Saved(None)
    wide = torch.promote_types(dtype, torch.float32)
    mean, rstd = (x.new_empty(call.num_tokens, dtype=wide) for _ in range(2))
    return outputs, Saved(z, mean if call.norm == "layer" else None, rstd)


def keeps_sum(call: AdapterCall, save: bool) -> bool:
    """Whether a forward returns y: not where a norm follows, and nothing else reads it."""
    return save or call.prenorm or call.norm == "none"


def unit_stride(call: AdapterCall | GroupedCall) -> int:
    """Elements from one row of z, dz or a to the next: R, rounded up to a multiple of 8, so that
    kernels read and write rows in vectors of 16 bytes whatever R is.
    """
    return -(-call.bottleneck_size // 8) * 8


def empty_units(
    call: AdapterCall | GroupedCall, *rows: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Room for z, dz, a or sums of these, [*rows, R], in the compute dtype if no other is given.

    Rows are `unit_stride` elements apart. What lies between two rows is there but nobody's: it may
    be written and must not be relied on.
    """
    room = call.x.new_empty((*rows, unit_stride(call)), dtype=dtype or call.compute_dtype)
    return room if call.bottleneck_size % 8 == 0 else room[..., : call.bottleneck_size]


def unit_rows(call: AdapterCall | GroupedCall, tensor: Tensor) -> Tensor:
    """[T, R] in rows as `empty_units` makes them: the tensor itself, or a copy."""
    if tensor.stride() == (unit_stride(call), 1):
        return tensor
    return empty_units(call, tensor.shape[0]).copy_(tensor)


def empty_gradients(call: AdapterCall, needs: Needs) -> Gradients:
    """Room for the gradients asked for, contiguous whatever the strides of the tensors are."""
    return Gradients(
        *[
            t.new_empty(shape_of(t)) if need and t is not None else None
            for t, need in zip(tensor_values(call), needs, strict=True)
        ]
    )


def empty_grouped_outputs(call: GroupedCall, save: bool) -> tuple[Tensor, Tensor | None]:
    """Room for y, contiguous whatever the strides of x are, and with `save` for z."""
    y = call.x.new_empty(call.x.shape, dtype=call.output_dtype)
    return y, empty_units(call, call.num_tokens) if save else None


def empty_grouped_gradients(call: GroupedCall, needs: GroupedNeeds) -> GroupedGradients:
    """Room for the gradients asked for, but for those of residual and skip, which are dy itself."""
    found = [
        t.new_empty(shape_of(t)) if need and t is not None else None
        for t, need in zip(grouped_tensor_values(call), needs, strict=False)
    ]
    return GroupedGradients(*found)._replace(residual=None, skip=None)


def zero_gradients(call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs) -> Gradients:
    """The gradients of a call without tokens."""
    zeros = [None if t is None else t.zero_() for t in empty_gradients(call, needs)]
    d_sum = upstream.y if saved.stream is None else torch.zeros_like(saved.stream)
    return Gradients(*zeros)._replace(**added_gradients(d_sum, needs))


def scaling_gradient(call: AdapterCall, sums: Tensor | None) -> Tensor | None:
    """The gradient of a learned scaling from `sums` [H], float32: over all features for [1]."""
    if sums is None or call.scaling is None:
        return None
    if shape_of(call.scaling)[0] == 1:
        sums = sums.sum(0, keepdim=True)
    return sums.to(call.scaling.dtype)


def rows(tensor: Tensor) -> Tensor:
    """[T, H] with unit stride across: a view where the strides allow it, else one copy."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def optional_rows(tensor: Tensor | None) -> Tensor | None:
    """The same of a tensor that may be absent, or an outline."""
    return None if tensor is None or not has_values(tensor) else rows(tensor)


def packed(tensor: Tensor | None) -> Tensor | None:
    """A parameter without gaps, where there is one with values."""
    return None if tensor is None or not has_values(tensor) else tensor.contiguous()


def allow_tf32() -> bool:
    """Whether torch's settings let float32 matrix products run in TF32
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.allow_tf32`, or the newer
    `fp32_precision`).
    """
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
