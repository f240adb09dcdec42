"""Times what a call costs the host beside its arithmetic: the tensors are so small that nothing
else counts. It asserts no time: run it with --benchmark-json to keep numbers, or
--benchmark-disable to see that every path runs.
"""

import pytest
import torch
from torch import nn

import adapterkern as ak
from adapterkern.backends import get
from adapterkern.ops import run as run_op
from adapterkern.results import Needs, Outputs, given_of
from adapterkern.spec import make_call
from benchmarks.free_launches import NAMES, free_launches

HIDDEN, BOTTLENECK, TOKENS = 64, 8, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[False, True], ids=["inference", "training"])
def x(request):
    with torch.set_grad_enabled(request.param):
        yield torch.randn(TOKENS, HIDDEN, device=DEVICE, requires_grad=request.param)


@pytest.fixture
def adapter():
    return ak.BottleneckAdapter(HIDDEN, BOTTLENECK, init="bert", device=DEVICE)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"device": DEVICE}
        down, up = nn.Linear(HIDDEN, BOTTLENECK, **sizes), nn.Linear(BOTTLENECK, HIDDEN, **sizes)
        self.layers = nn.Sequential(down, nn.GELU(), up)

    def forward(self, x):
        return x + self.layers(x)


def test_eager_layers(benchmark, x):
    y = benchmark(Plain(), x)
    assert y.shape == x.shape


def test_module(benchmark, x, adapter):
    y = benchmark(adapter, x)
    assert y.shape == x.shape


def test_function(benchmark, x, adapter):
    down, up = adapter.down_proj, adapter.up_proj
    y = benchmark(ak.bottleneck_adapter, x, down.weight, up.weight, down.bias, up.bias)
    assert y.shape == x.shape


def test_op(benchmark, x, adapter):
    down, up = adapter.down_proj, adapter.up_proj
    biases = down.bias, up.bias
    call = make_call(x, down.weight, up.weight, *biases, "input", None, "gelu", 1.0, 0.0)
    backend = "reference" if DEVICE == "cpu" else ak.explain(adapter, x).backend
    y = given_of(benchmark(run_op, call, backend))
    assert y.shape == x.shape


@pytest.mark.parametrize("kind", ["eager", "module"])
def test_backward(benchmark, adapter, kind):
    module = adapter if kind == "module" else Plain()
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE, requires_grad=True)
    y = module(x)
    leaves = [x, *module.parameters()]
    dy = torch.ones_like(y)
    gradients = benchmark(torch.autograd.grad, y, leaves, dy, retain_graph=True)
    assert len(gradients) == len(leaves)


@pytest.fixture(params=NAMES)
def backend(request):
    """A kernel backend: on a GPU as it is, elsewhere with launches that do nothing."""
    if DEVICE == "cpu":
        pytest.importorskip("triton" if "triton" in request.param else "torch")
        with free_launches(request.param) as free:
            yield free
    elif request.param == "triton-row-block":
        pytest.skip("so few tokens take the other form on a whole GPU")
    else:
        chosen = get(request.param)
        if reason := chosen.unavailable_reason():
            pytest.skip(reason)
        yield chosen


@torch.no_grad()
def test_backend_forward(benchmark, backend, adapter):
    call = call_of(adapter)
    outputs, saved = benchmark(backend.forward, call, True)
    assert outputs.y.shape == call.x.shape
    assert saved.z.shape == (TOKENS, BOTTLENECK)


@torch.no_grad()
def test_backend_backward(benchmark, backend, adapter):
    call, needs = call_of(adapter), Needs(*[True] * 5)
    outputs, saved = backend.forward(call, True)
    gradients = benchmark(backend.backward, call, saved, Outputs(outputs.y), needs)
    assert sum(gradient is not None for gradient in gradients) == 5


def call_of(adapter):
    down, up = adapter.down_proj, adapter.up_proj
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    return make_call(x, down.weight, up.weight, down.bias, up.bias)
