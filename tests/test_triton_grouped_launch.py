"""What the Triton launches of many adapters make, on a recorded, stand-in GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from fake_gpu import FakeGpu, fake_gpu

import adapterkern as ak
from adapterkern.backends import get
from adapterkern.grouped.call import GroupedNeeds


class Memories(TorchDispatchMode):
    """Within the block, every memory of so many elements that an operation returns."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.elements:
            self.found.add(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("tokens", [16, 4096], ids=["by-row", "tiled"])
def test_no_copy_of_the_tokens_rows_is_made(tokens):
    """They are gathered as they are loaded: of the size of x there are x, y and dx alone."""
    bank, triton = ak.AdapterBank(8192, 4, 2), get("triton")
    for name in "fr", "de":
        bank.add(name, ak.BottleneckAdapter(8192, 4))
    x = torch.ones(tokens, 8192)
    routing = ak.AdapterRouting(tokens, 2).update([i % 3 - 1 for i in range(tokens)])
    needs = GroupedNeeds(True, True, True, True, True)
    with fake_gpu(FakeGpu()), torch.no_grad(), Memories(x.numel()) as memories:
        call = bank.as_call(x, routing)
        y, z = triton.grouped_forward(call, True)
        gradients = triton.grouped_backward(call.for_backward(needs), z, x, needs)
    assert memories.found <= {t.data_ptr() for t in (x, y, gradients.x)}
    assert y.data_ptr() in memories.found
