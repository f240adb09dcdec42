"""torch.compile(fullgraph=True): numbers, graphs, recompilations, compiled autograd."""

import subprocess
import sys

import pytest
import torch
from eager import eager_adapter, gradients, tensors
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import adapterkern as ak
from adapterkern.results import Needs

pytestmark = pytest.mark.usefixtures("recompiled")

BACKENDS = ["aot_eager", "inductor"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def compiled_of(backend="aot_eager", **options):
    return torch.compile(ak.bottleneck_adapter, backend=backend, fullgraph=True, **options)


def assert_same(function, arguments, tolerance=CLOSE, expected=ak.bottleneck_adapter, **options):
    y, found = gradients(function, arguments, **options)
    want_y, want = gradients(expected, arguments, **options)
    assert y.dtype == want_y.dtype
    torch.testing.assert_close(y, want_y, **tolerance)
    for name in want:
        assert found[name].dtype == want[name].dtype
        torch.testing.assert_close(found[name], want[name], **tolerance, msg=name)


@pytest.mark.sweep("backend", "options")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"residual": True, "skip": True, "scaling": 10}],
    ids=["biases", "bare", "everything"],
)
def test_compiled_forward_and_backward_equal_eager(backend, options):
    arguments = tensors((3, 5), dtype=torch.float32, **options)
    assert_same(compiled_of(backend), arguments, expected=eager_adapter)


@pytest.mark.sweep("backend", "dynamic")
@pytest.mark.parametrize("dynamic", [None, True], ids=["auto", "dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_many_sizes_need_at_most_one_recompilation(backend, dynamic):
    counter = CompileCounterWithBackend(backend)
    adapter = ak.BottleneckAdapter(16, 4, init="bert")
    compiled = torch.compile(adapter, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (3, 8, 5, 64, 2):
        x = torch.randn(batch, 7, 16, requires_grad=True)
        y = compiled(x)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        expected = adapter(x)
        torch.testing.assert_close(y, expected, **CLOSE)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected.square().sum(), x)[0], **CLOSE
        )
    assert counter.frame_count <= 2


def test_a_marked_dynamic_batch_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    adapter = ak.BottleneckAdapter(16, 4, init="bert")
    compiled = torch.compile(adapter, backend=counter, fullgraph=True)
    for batch in (3, 8, 64):
        x = torch.randn(batch, 16)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), adapter(x), **CLOSE)
    assert counter.frame_count == 1


def test_graphs_hold_one_op_each_way():
    graphs = []

    def record(graph, _inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    adapter = ak.BottleneckAdapter(16, 4)
    torch.compile(adapter, backend=backend, fullgraph=True)(torch.randn(3, 16)).sum().backward()
    forward, backward = graphs
    assert forward.count("adapterkern.forward.default") == 1
    assert backward.count("adapterkern.backward.default") == 1
    assert not [target for graph in graphs for target in graph if target.startswith("aten.mm")]


def test_the_compiled_backward_computes_only_what_is_needed(spy):
    arguments = tensors((3,), dtype=torch.float32)
    for name in ("down_weight", "up_weight", "down_bias", "up_bias"):
        arguments[name].requires_grad_(False)
    compiled_of()(**arguments).sum().backward()
    assert spy.backwards == [Needs(x=True)]


def test_compiled_code_without_gradients_does_not_save_z(spy):
    arguments = tensors((3,), dtype=torch.float32)
    with torch.no_grad():
        compiled_of()(**arguments)
    assert spy.forwards == [False]


@pytest.mark.sweep("backend", "inside")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_autocast_inside_and_around_compiled_code(backend, inside):
    def call(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return ak.bottleneck_adapter(**arguments)

    function = call if inside else ak.bottleneck_adapter
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def run(**arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            return compiled(**arguments)

    arguments = tensors((3,), dtype=torch.float32)
    assert_same(run, arguments, {"rtol": 0.02, "atol": 0.02}, expected=call)


def test_half_precision_with_float32_masters_compiles():
    arguments = tensors((3,), dtype=torch.float32, residual=True)
    arguments["x"] = arguments["x"].detach().bfloat16()
    assert_same(compiled_of("inductor"), arguments, {"rtol": 0.02, "atol": 0.02})


def test_a_compiled_block_around_the_adapter_equals_eager():
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 16), ak.BottleneckAdapter(16, 4, init="bert"), torch.nn.LayerNorm(16)
    )
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 16, requires_grad=True)
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)


def test_dropout_compiles_and_follows_the_seed():
    adapter = ak.BottleneckAdapter(64, 4, init="bert", dropout=0.5)
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64)
    torch.manual_seed(1)
    found = compiled(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, adapter(x), **CLOSE)


def test_switching_the_backend_recompiles(spy):
    arguments = tensors((3,), dtype=torch.float32)
    compiled = compiled_of()
    compiled(**arguments)
    assert len(spy.forwards) == 1
    with ak.use_backend("reference"):
        compiled(**arguments)
    assert len(spy.forwards) == 1
    compiled(**arguments)
    assert len(spy.forwards) == 2


def tolerance_of(tensor):
    """A few roundings of the largest element."""
    rounding = torch.finfo(tensor.dtype).eps
    return {"rtol": 4 * rounding, "atol": 4 * rounding * tensor.abs().max().item()}


@pytest.mark.sweep("backend", "dtype", "of_module")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_module", [True, False], ids=["attribute", "argument"])
def test_a_scaling_that_changes_compiles_as_often_as_plain_layers(backend, dtype, of_module):
    """Twice: for the first value, and for all others."""
    adapter = ak.BottleneckAdapter(16, 4, init="bert", dtype=dtype)
    down, up = adapter.down_proj.weight, adapter.up_proj.weight
    counter = CompileCounterWithBackend(backend)

    def function(x, scaling):
        return ak.bottleneck_adapter(x, down, up, residual=None, skip=x, scaling=scaling)

    compiled = torch.compile(adapter if of_module else function, backend=counter, fullgraph=True)
    for scaling in (0.5, 0.25, 3.0, -1.0, 0.0, 7.5):
        x = torch.randn(3, 16, dtype=dtype, requires_grad=True)
        if of_module:
            adapter.scaling = scaling
        options = () if of_module else (scaling,)
        y, expected = compiled(x, *options), (adapter if of_module else function)(x, *options)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, **tolerance_of(expected))
        wanted = [x, down, up]
        found = torch.autograd.grad(y.square().sum(), wanted)
        for gradient, want in zip(
            found, torch.autograd.grad(expected.square().sum(), wanted), strict=True
        ):
            # In half precision the scale is applied before or after a rounding.
            torch.testing.assert_close(gradient, want, **tolerance_of(want))
    assert counter.frame_count == 2


def test_a_scaling_that_stays_goes_into_the_op(spy):
    """In one pass, with what is added after it."""
    graphs = []

    def record(graph, _inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    adapter = ak.BottleneckAdapter(16, 4, scaling=0.5)
    with torch.no_grad():
        compiled = torch.compile(adapter, backend=aot_autograd(fw_compiler=record), fullgraph=True)
        compiled(torch.randn(3, 16))
    ((*operations,),) = graphs
    assert [name for name in operations if "getitem" not in name] == ["adapterkern.forward.default"]


def test_a_hook_added_later_fires_in_compiled_code():
    adapter, fired = ak.BottleneckAdapter(16, 4, init="bert"), []
    compiled = torch.compile(adapter, backend="aot_eager")
    x = torch.randn(3, 16)
    expected = compiled(x)
    adapter.down_proj.register_forward_hook(lambda *a: fired.append(1))
    torch.compiler.reset()
    torch.testing.assert_close(compiled(x), expected, **CLOSE)
    assert fired == [1]


def test_bad_input_raises_the_same_error_while_compiling():
    with pytest.raises(Exception, match="this looks like its transpose"):
        compiled_of()(torch.randn(3, 8), torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(Exception, match='backend "cuda" cannot run this call'):
        compiled_of()(torch.randn(3, 8), torch.randn(4, 8), torch.randn(8, 4), backend="cuda")


def test_compiled_autograd_gives_the_same_gradients():
    adapter = ak.BottleneckAdapter(16, 4, init="bert")
    x = torch.randn(3, 16)
    expected = torch.autograd.grad(adapter(x).square().sum(), adapter.parameters())
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: adapter(x).square().sum().backward(), backend="aot_eager")()
    for parameter, want in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, **CLOSE)


def test_compiled_autograd_of_an_eager_forward_sees_the_op_and_not_the_kernel(spy):
    adapter = ak.BottleneckAdapter(16, 4, init="bert")
    x, skip = torch.randn(3, 16), torch.randn(3, 16, requires_grad=True)
    expected = torch.autograd.grad(
        adapter(x, skip=skip).square().sum(), (skip, *adapter.parameters())
    )
    loss, graphs = adapter(x, skip=skip).square().sum(), []

    def record(graph, _inputs):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend=aot_autograd(fw_compiler=record))()
    assert any("adapterkern.backward.default" in graph for graph in graphs)
    found = (skip.grad, *(p.grad for p in adapter.parameters()))
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, **CLOSE)


@pytest.mark.thorough
def test_the_first_call_of_a_process_may_be_a_compiled_one():
    """Backends are imported at first use, which torch.compile cannot trace."""
    code = (
        "import torch, adapterkern as ak\n"
        "f = torch.compile(ak.BottleneckAdapter(8, 2), backend='eager', fullgraph=True)\n"
        "x = torch.randn(3, 8)\n"
        "print(torch.equal(f(x), x))"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error:Dynamo", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout == "True\n", ran.stderr
