"""Capabilities of the reference: every device and dtype, and every feature there is today."""

from torch import Tensor

from adapterkern import reference
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends.base import (
    FIRST_FEATURES,
    GROUPED_FEATURES,
    NORM_FEATURES,
    Backend,
    keeps_sum,
    unit_rows,
)
from adapterkern.grouped import reference as grouped_reference
from adapterkern.grouped.call import OPERATION, GroupedCall, GroupedGradients, GroupedNeeds
from adapterkern.results import Gradients, Needs, Outputs, Saved
from adapterkern.spec import PLAIN_FEATURES, AdapterCall
from adapterkern.validation import FLOAT_DTYPES


class ReferenceBackend(Backend):
    """`adapterkern.reference` behind the contract of a backend."""

    name = "reference"
    devices = None  # all: it is plain PyTorch
    dtypes = frozenset(FLOAT_DTYPES)
    activations = frozenset(ACTIVATIONS)
    features = FIRST_FEATURES | NORM_FEATURES | GROUPED_FEATURES | PLAIN_FEATURES
    operations = frozenset({"bottleneck_adapter", OPERATION})

    def unavailable_reason(self) -> None:
        return None

    def forward(self, call: AdapterCall, save: bool) -> tuple[Outputs, Saved]:
        outputs, saved = reference.forward_of_values(call)
        y, normed = (None if t is None else t.contiguous() for t in outputs)
        if not keeps_sum(call, save):
            y = None
        if not save or saved.z is None:
            return Outputs(y, normed), Saved(None)
        z = unit_rows(call, saved.z.reshape(-1, call.bottleneck_size))
        return Outputs(y, normed), saved._replace(z=z)

    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        return reference.backward(call, saved, upstream, needs)

    def grouped_forward(self, call: GroupedCall, save: bool) -> tuple[Tensor, Tensor | None]:
        y, z = grouped_reference.forward(call, save)
        return y, None if z is None else unit_rows(call, z)

    def grouped_backward(
        self, call: GroupedCall, z: Tensor | None, dy: Tensor, needs: GroupedNeeds
    ) -> GroupedGradients:
        return grouped_reference.backward(call, z, dy, needs)
