"""Capabilities of the reference: everything."""

from torch import Tensor

from adapterkern import reference
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends.base import Backend, Gradients, Needs
from adapterkern.spec import FLOAT_DTYPES, AdapterCall, AdapterSpec


class ReferenceBackend(Backend):
    """`adapterkern.reference` behind the contract of a backend."""

    name = "reference"
    dtypes = frozenset(FLOAT_DTYPES)
    activations = frozenset(ACTIVATIONS)

    def unavailable_reason(self) -> None:
        return None

    def unsupported_reasons(self, spec: AdapterSpec) -> list[str]:
        return []  # any device, any feature: it is plain PyTorch

    def forward(self, call: AdapterCall, save_z: bool) -> tuple[Tensor, Tensor]:
        y, z = reference.forward(call)
        z = z.reshape(-1, call.bottleneck_size) if save_z else z.new_empty(0)
        return y.contiguous(), z

    def backward(
        self, call: AdapterCall, z: Tensor, grad_output: Tensor, needs: Needs
    ) -> Gradients:
        return Gradients(*reference.backward(call, z, grad_output, tuple(needs)))
