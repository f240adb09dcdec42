"""What a call gives, keeps and is asked for: its outputs, saved tensors, needs and gradients.

`Needs` and `Gradients` have a field for each tensor of `spec.AdapterCall`, in its order.
"""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """The outputs of a call; upstream of a backward, the gradient of each."""

    y: Tensor | None  # [..., H], contiguous, in `AdapterCall.output_dtype`
    normed: Tensor | None = None  # [..., H], contiguous, in `AdapterCall.normed_dtype`


def given_of(outputs: Outputs) -> Tensor:
    """One of the outputs that is there.

    A forward leaves out `normed` without a norm, and y with one where neither `prenorm` nor a
    backward asks for it; upstream has what a gradient came for. A function, since torch.compile of
    torch 2.9 makes a graph of its own of a property.
    """
    one = outputs.y if outputs.normed is None else outputs.normed
    assert one is not None
    return one


class Saved(NamedTuple):
    """The tensors that a forward keeps for its backward; None where it was not asked to."""

    z: Tensor | None  # [T, R], the pre-activation, in `AdapterCall.compute_dtype`
    mean: Tensor | None = None  # [T], of y before it was rounded; of a LayerNorm
    rstd: Tensor | None = None  # [T], 1 / sqrt(variance + eps), or of the mean of the squares
    stream: Tensor | None = None  # y of a call with a norm; not set by a forward, which returns it


class Needs(NamedTuple):
    """Which gradients are asked for; the tensors of `AdapterCall`."""

    x: bool = False
    down_weight: bool = False
    up_weight: bool = False
    down_bias: bool = False
    up_bias: bool = False
    residual: bool = False
    skip: bool = False
    scaling: bool = False
    norm_weight: bool = False
    norm_bias: bool = False

    @property
    def dz(self) -> bool:
        """Whether the gradient of the pre-activation is needed on the way."""
        return self.x or self.down_weight or self.down_bias

    @property
    def z(self) -> bool:
        """Whether the pre-activation is needed."""
        return self.dz or self.up_weight or self.scaling

    @property
    def added(self) -> bool:
        """Whether the gradient of the sum itself is asked for."""
        return self.residual or self.skip

    @property
    def sum(self) -> bool:
        """Whether the gradient of the sum is needed at all, by which all others come but those of
        the norm's parameters."""
        return self.z or self.up_bias or self.added

    @property
    def stream(self) -> bool:
        """Whether the sum itself is needed, if a norm follows it."""
        return self.sum or self.norm_weight

    @property
    def parameters(self) -> bool:
        """Whether a gradient of the adapter is a sum over the tokens."""
        return self.down_weight or self.up_weight or self.down_bias or self.up_bias or self.scaling


class Gradients(NamedTuple):
    """Gradients of one call, each in its tensor's shape and dtype; None where not asked for.

    Those of residual and skip are in the dtype of y: a backward does not see these two tensors.
    """

    x: Tensor | None = None
    down_weight: Tensor | None = None
    up_weight: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    residual: Tensor | None = None
    skip: Tensor | None = None
    scaling: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def added_gradients(d_sum: Tensor | None, needs: Needs) -> dict[str, Tensor | None]:
    """The gradients of residual and skip: that of the sum that they are added to, itself."""
    return {
        "residual": d_sum if needs.residual else None,
        "skip": d_sum if needs.skip else None,
    }
