"""Capabilities of the CUDA backend: those of the kernels that the extension holds."""

from torch import Tensor

from adapterkern.backends.base import Backend, BackendUnsupportedError, Gradients, Needs
from adapterkern.backends.cuda import extension
from adapterkern.spec import AdapterCall, AdapterSpec


class CudaBackend(Backend):
    """Launches the kernels of `adapterkern._cuda`."""

    name = "cuda"
    devices = frozenset({"cuda"})
    dtypes = frozenset()
    activations = frozenset()
    features = frozenset()

    def __init__(self) -> None:
        # Asked once, here: the answer stays, and torch.compile must not trace an import.
        self._unavailable = extension.unavailable_reason()

    def unavailable_reason(self) -> str | None:
        return self._unavailable

    def unsupported_reasons(self, spec: AdapterSpec) -> list[str]:
        if self._unavailable is not None:  # the declarations of absent kernels would only repeat it
            return [self._unavailable]
        return super().unsupported_reasons(spec)

    def forward(self, call: AdapterCall, save_z: bool) -> tuple[Tensor, Tensor]:
        raise BackendUnsupportedError(f'backend "{self.name}": {self._unavailable}')

    def backward(
        self, call: AdapterCall, z: Tensor, grad_output: Tensor, needs: Needs
    ) -> Gradients:
        raise BackendUnsupportedError(f'backend "{self.name}": {self._unavailable}')
