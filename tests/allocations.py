"""A count of what a piece of code allocates."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATING = ("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros")


class Allocations(TorchDispatchMode):
    """Within the block, `with Allocations() as allocated` lists every new tensor."""

    def __enter__(self) -> list[Tensor]:
        self.made: list[Tensor] = []
        super().__enter__()
        return self.made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _ALLOCATING:
            self.made.append(result)
        return result
