"""Graphs for other programs hold plain operations: torch.export, torch.jit.trace, torch.fx."""

import io
import pickle
import subprocess
import sys

import pytest
import torch
from eager import EagerAdapter
from torch import nn

import adapterkern as ak
from adapterkern import dispatch

FORWARD = torch.ops.adapterkern.forward.default
RANGE = {0: torch.export.Dim("batch", min=1, max=64)}


def adapter_and_twin(**options):
    adapter = ak.BottleneckAdapter(8, 4, init="bert", **options)
    twin = EagerAdapter(8, 4)
    twin.load_state_dict(adapter.state_dict())
    return adapter, twin


def operations(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def assert_trains_like(module, adapter):
    """By the parameters' gradients, bit for bit: both run the same plain operations."""
    x = torch.randn(5, 8)
    module(x).square().sum().backward()
    adapter(x).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_graph_holds_plain_operations_and_a_dynamic_batch(strict, spy):
    """Whatever backend this machine would choose."""
    adapter, twin = adapter_and_twin()
    programs = [
        torch.export.export(module, (torch.randn(3, 8),), dynamic_shapes=(RANGE,), strict=strict)
        for module in (adapter, twin)
    ]
    assert operations(programs[0].graph) == operations(programs[1].graph)
    assert not spy.forwards
    for batch in (1, 7):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(programs[0].module()(x), twin(x), rtol=0, atol=0)


def test_an_exported_graph_has_no_trace_of_the_reference_named_as_backend():
    adapter, twin = adapter_and_twin(backend="reference")
    programs = [torch.export.export(module, (torch.randn(3, 8),)) for module in (adapter, twin)]
    assert operations(programs[0].graph) == operations(programs[1].graph)


def test_an_exported_graph_keeps_the_kernel_that_was_named(spy):
    adapter, twin = adapter_and_twin(backend="triton")
    program = torch.export.export(adapter, (torch.randn(3, 8),), dynamic_shapes=(RANGE,))
    assert operations(program.graph).count(str(FORWARD)) == 1
    x = torch.randn(7, 8)
    torch.testing.assert_close(program.module()(x), twin(x))
    assert len(spy.forwards) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("autocast", [True, False])
def test_an_exported_program_runs_and_trains_where_the_package_is_not(tmp_path, autocast):
    adapter = ak.BottleneckAdapter(8, 4, init="bert", scaling="learned")
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = adapter(x)
        program = torch.export.export(adapter, (x,), dynamic_shapes=(RANGE,))
    torch.export.save(program, tmp_path / "adapter.pt2")
    torch.save((x, expected), tmp_path / "pair.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['adapterkern'] = None\n"
        "module = torch.export.load('adapter.pt2').module()\n"
        "x, expected = torch.load('pair.pt')\n"
        "y = module(x)\n"
        "y.sum().backward()\n"
        "print(torch.equal(y, expected), all(p.grad is not None for p in module.parameters()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == "True True\n", ran.stderr


def test_a_loaded_program_trains_as_the_adapter_does(tmp_path):
    adapter, _ = adapter_and_twin()
    program = torch.export.export(adapter, (torch.randn(3, 8),), dynamic_shapes=(RANGE,))
    torch.export.save(program, tmp_path / "adapter.pt2")
    assert_trains_like(torch.export.load(tmp_path / "adapter.pt2").module(), adapter)


def test_an_exported_program_keeps_forward_mode_tangents():
    adapter = ak.BottleneckAdapter(8, 4, init="bert").requires_grad_(False)
    x, tangent = torch.randn(2, 3, 8)
    module = torch.export.export(adapter, (torch.randn(3, 8),)).module()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
    _, expected = torch.func.jvp(adapter, (x,), (tangent,))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["recorded", "no-grad"])
def test_a_traced_adapter_is_saved_loaded_and_trained(spy, grad):
    adapter, twin = adapter_and_twin()
    with torch.set_grad_enabled(grad):
        traced, plain = (
            torch.jit.trace(m, torch.randn(3, 8), check_trace=False) for m in (adapter, twin)
        )
    kinds = [
        [n.kind() for n in t.inlined_graph.nodes() if "aten" in n.kind()] for t in (traced, plain)
    ]
    assert kinds[0] == kinds[1]
    assert not spy.forwards
    assert not dispatch._decisions  # sizes of a trace are no keys
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in (1, 7):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(loaded(x), twin(x), rtol=0, atol=0)
    assert_trains_like(loaded, twin)


def test_a_trace_is_no_fallback(monkeypatch, caplog):
    """Nothing is logged, and ADAPTERKERN_STRICT=1 has nothing to refuse."""
    spec = ak.BottleneckAdapter(8, 4).as_call(torch.randn(3, 8)).spec()
    monkeypatch.setattr(dispatch._env, "STRICT", "1")
    on_gpu = type(spec)(**{**vars(spec), "device": torch.device("cuda", 0)})
    decision = dispatch._decide_in_graph(on_gpu, "auto", exports=True)
    assert (decision.backend, decision.plain) == ("reference", True)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_refuses_a_kernel_by_name(spy):
    adapter, _ = adapter_and_twin(backend="triton")
    with pytest.raises(ak.BackendUnsupportedError, match=r"torch\.jit\.trace records operations"):
        torch.jit.trace(adapter, torch.randn(3, 8))


@pytest.mark.parametrize("options", [{}, {"scaling": "channel", "activation": "relu"}], ids=str)
def test_fx_makes_one_node_of_an_adapter(options):
    adapter = ak.BottleneckAdapter(8, 4, init="bert", **options)
    model = nn.Sequential(nn.Linear(8, 8), adapter)
    graph = torch.fx.symbolic_trace(model)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [ak.bottleneck_adapter]
    x = torch.randn(7, 8)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    loaded = pickle.loads(pickle.dumps(graph))
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    found = torch.autograd.grad(graph(x).square().sum(), graph.parameters())
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["x", "residual", "skip", "down_weight", "up_bias", "scaling"])
def test_whatever_is_like_a_tensor_may_stand_for_any_tensor(name):
    seen = []

    class Like:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append((function, args, kwargs))
            return "answer"

    given = {
        "x": torch.randn(3, 8), "down_weight": torch.randn(4, 8), "up_weight": torch.randn(8, 4),
    }  # fmt: skip
    given[name] = Like()
    assert ak.bottleneck_adapter(**given, activation="relu") == "answer"
    ((function, args, kwargs),) = seen
    assert function is ak.bottleneck_adapter
    assert any(value is given[name] for value in (*args, *kwargs.values()))
    assert kwargs["activation"] == "relu"


def test_a_mode_of_torch_functions_sees_the_call():
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function)
            return function(*args, **(kwargs or {}))

    names = []
    adapter, twin = adapter_and_twin()
    x = torch.randn(3, 8)
    with Names():
        y = adapter(x)
    torch.testing.assert_close(y, twin(x))
    assert ak.bottleneck_adapter in names
