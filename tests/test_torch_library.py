"""The registered ops as torch sees them: opcheck, fake tensors, counters."""

import pytest
import torch
from allocations import Allocations
from eager import eager_adapter, gradients, tensors
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import adapterkern as ak
from adapterkern import ops
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import make_call

FORWARD = torch.ops.adapterkern.forward.default
BACKWARD = torch.ops.adapterkern.backward.default


def op_arguments(
    bias=True, permuted=False, dtype=torch.float32, add_input=True, learned=False, **more
):
    given = tensors((4, 6), dtype=dtype, bias=bias, scaling=10 if learned else None, **more)
    if permuted:
        for name in ("x", "residual", "skip"):
            if name in given:
                given[name] = given[name].detach().transpose(0, 1).requires_grad_()
        given["up_weight"] = given["up_weight"].detach().T.contiguous().T.requires_grad_()
    options = {"scaling": 0.5, "residual": "input" if add_input else None}
    return make_call(**options | given)


def of_backward(z, grad_y):
    """What the backward op takes beside a call without a norm."""
    return *Saved(z), *Outputs(grad_y)


def detached(call):
    given = {name: t.detach() for name, t in call.tensors().items() if t is not None}
    return call._replace(**given)


OP_CASES = {
    "plain": {},
    "no-biases": {"bias": False},
    "permuted": {"permuted": True, "residual": True, "skip": True, "add_input": False},
    "bf16": {"dtype": torch.bfloat16},
    "learned": {"learned": True, "add_input": False},
}


@pytest.mark.sweep("save", "options")
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("options", OP_CASES.values(), ids=OP_CASES)
def test_forward_op_passes_opcheck(options, save):
    """Schema, autograd registration, fake outputs, and AOTAutograd's tracing of gradients."""
    torch.library.opcheck(FORWARD, ("reference", save, *op_arguments(**options)))


NORM_CASES = {
    "layer_norm": {},
    "rms_norm": {"norm": "rms", "norm_bias": None},
    "without_parameters": {"norm_weight": None, "norm_bias": None, "prenorm": True},
    "offset": {"norm": "rms", "weight_offset": 1.0, "cast_before_weight": True},
}


def with_a_norm(call, norm_weight=1.0, norm_bias=0.5, norm="layer", prenorm=False, **options):
    """The call with a norm behind it, whose parameters have these values."""
    parameters = {
        name: None if value is None else torch.full((call.hidden_size,), value, requires_grad=True)
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias))
    }
    return call._replace(**parameters, norm=norm, prenorm=prenorm, **options)


@pytest.mark.sweep("save", "options")
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("options", NORM_CASES.values(), ids=NORM_CASES)
def test_forward_op_passes_opcheck_with_a_norm(options, save):
    call = with_a_norm(op_arguments(), **options)
    torch.library.opcheck(FORWARD, ("reference", save, *call))


def backward_arguments(call, needs, d_normed=False, d_stream=True):
    """What the backward op takes of a call, after its forward."""
    y, normed, z, mean, rstd = FORWARD("reference", True, *call)
    needs = [need and t is not None for need, t in zip(needs, call.tensors().values(), strict=True)]
    dy = torch.randn_like(y).transpose(0, 1).contiguous().transpose(0, 1) if d_stream else None
    if not d_normed:
        return "reference", needs, *call, *of_backward(z, dy)
    mean = mean if call.norm == "layer" else None
    upstream = Outputs(dy, torch.randn_like(normed))
    return "reference", needs, *call, *Saved(z, mean, rstd, y), *upstream


@pytest.mark.sweep("needs", "options")
@pytest.mark.parametrize("needs", [Needs(*[True] * 10), Needs(x=True), Needs(True, skip=True)])
@pytest.mark.parametrize("options", OP_CASES.values(), ids=OP_CASES)
def test_backward_op_passes_opcheck(options, needs):
    call = detached(op_arguments(**options))
    torch.library.opcheck(BACKWARD, backward_arguments(call, needs))


@pytest.mark.sweep("d_stream", "needs", "options")
@pytest.mark.parametrize("d_stream", [True, False])
@pytest.mark.parametrize(
    "needs", [Needs(*[True] * 10)._replace(skip=False), Needs(x=True), Needs(norm_bias=True)]
)
@pytest.mark.parametrize("options", NORM_CASES.values(), ids=NORM_CASES)
def test_backward_op_passes_opcheck_with_a_norm(options, needs, d_stream):
    plain = op_arguments(residual=True, add_input=False)
    call = detached(with_a_norm(plain, **options | {"prenorm": d_stream}))
    torch.library.opcheck(BACKWARD, backward_arguments(call, needs, True, d_stream))


def test_forward_op_is_differentiable_where_a_graph_calls_it(spy):
    """The op's own autograd kernel: a graph replays the op, not the function around it."""
    given = op_arguments(residual=True, add_input=False)
    y, _, z, _, _ = FORWARD("triton", True, *given)
    wanted = {name: t for name, t in given.tensors().items() if t is not None}
    found = torch.autograd.grad(y.sum(), list(wanted.values()))
    eager = eager_adapter(**wanted, scaling=given.scale)
    wanted = list(wanted.values())
    expected = torch.autograd.grad(eager.sum(), wanted)
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)
    assert z.shape == (24, 4)
    assert len(spy.backwards) == 1


def test_forward_op_is_differentiable_in_the_pre_activation_too():
    """Second derivatives pass through it."""
    given = op_arguments()
    _, _, z, _, _ = FORWARD("reference", True, *given)
    leaves = [given.x, given.down_weight, given.down_bias]
    dz = torch.randn_like(z)
    found = torch.autograd.grad(z, leaves, dz)
    plain = torch.nn.functional.linear(*leaves)
    expected = torch.autograd.grad(plain, leaves, dz.view_as(plain))
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("device", ["MPS", "XPU", "PrivateUse1"])
def test_ops_have_a_kernel_for_devices_beside_cpu_and_cuda(device):
    """What such a device's tensors reach; here they are the CPU's."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    call = detached(op_arguments())
    y, _, z, _, _ = FORWARD.redispatch(keys, "reference", True, *call)
    given = {name: t.clone() for name, t in call.tensors().items() if t is not None}
    given["down_weight"].requires_grad_()
    eager = eager_adapter(**given, scaling=0.5)
    torch.testing.assert_close(y, eager.detach(), rtol=1e-5, atol=1e-5)
    needs = Needs(down_weight=True)
    found = BACKWARD.redispatch(
        keys, "reference", needs, *call, *of_backward(z, torch.ones_like(y))
    )
    eager.sum().backward()
    torch.testing.assert_close(found[0], given["down_weight"].grad, rtol=1e-5, atol=1e-5)


def test_ops_appear_by_name_in_the_profiler():
    adapter, x = ak.BottleneckAdapter(8, 4), torch.randn(3, 8)
    with torch.profiler.profile() as profile:
        adapter(x).sum().backward()
        with torch.no_grad():
            adapter(x)
    names = [event.name for event in profile.events()]
    assert names.count("adapterkern::forward") == 2
    assert names.count("adapterkern::backward") == 1


@pytest.mark.parametrize("grad", [True, False], ids=["recorded", "no-grad"])
def test_only_watched_calls_take_the_op_s_way_through_the_dispatcher(spy, monkeypatch, grad):
    adapter, x = ak.BottleneckAdapter(8, 4), torch.randn(3, 8)
    taken, op = [], ops._forward_op
    monkeypatch.setattr(ops, "_forward_op", lambda *args: taken.append(args) or op(*args))
    with torch.set_grad_enabled(grad):
        expected = adapter(x)
        assert not taken
        with Allocations():
            torch.testing.assert_close(adapter(x), expected)
        with torch.profiler.profile():
            adapter(x)
    assert len(taken) == 2
    assert len(spy.forwards) == 3


@pytest.mark.parametrize(
    ("frozen", "products"),
    [
        ((), 6),
        (("x",), 5),
        (("down_weight", "up_weight", "down_bias", "up_bias"), 4),
        (("x", "down_weight", "down_bias"), 3),
    ],
)
def test_flop_counter_counts_the_products_that_run(frozen, products):
    given = tensors((3, 5), 10, 4)
    for name in frozen:
        given[name].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        ak.bottleneck_adapter(**given).sum().backward()
    assert counter.get_total_flops() == products * 2 * 15 * 10 * 4


def test_flop_counter_sees_the_projections_of_a_module():
    """It hooks every module of the process, and hooks run only where a module is called."""
    adapter, x = ak.BottleneckAdapter(10, 4), torch.randn(3, 5, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        adapter(x).sum().backward()
    counts = counter.get_flop_counts()
    assert sum(counts["BottleneckAdapter.down_proj"].values()) == 3 * 2 * 15 * 10 * 4
    assert counter.get_total_flops() == 6 * 2 * 15 * 10 * 4


@pytest.mark.parametrize("shape", [(3, 5), (0,), ()], ids=str)
def test_meta_tensors_give_the_shapes_and_dtypes_of_a_real_call(shape):
    real = tensors(shape, dtype=torch.bfloat16, residual=True, scaling=10)
    real["residual"] = real["residual"].float()
    y, found = gradients(ak.bottleneck_adapter, real)
    meta = {name: t.detach().to("meta") for name, t in real.items()}
    meta_y, meta_found = gradients(ak.bottleneck_adapter, meta)
    for a, b in [(meta_y, y)] + [(meta_found[name], found[name]) for name in found]:
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert a.device.type == "meta"


def test_fake_tensors_run_forward_and_backward():
    with FakeTensorMode():
        adapter = ak.BottleneckAdapter(16, 4, dtype=torch.bfloat16)
        x = torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True)
        y = adapter(x)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((2, 3, 16), torch.bfloat16)
    assert x.grad.shape == x.shape
    assert adapter.up_proj.weight.grad.shape == (16, 4)


def test_fake_gradients_have_the_dtypes_of_real_ones_where_tensors_differ_in_dtype():
    given = {n: t.detach() for n, t in tensors((3,), residual=True, scaling=10).items()}
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16] * 3
    given = {name: t.to(dtype) for (name, t), dtype in zip(given.items(), dtypes, strict=False)}
    call = make_call(**given)
    needs = Needs(*[True] * 6, scaling=True)

    def layouts(call):
        y, _, z, _, _ = FORWARD("reference", True, *call)
        found = BACKWARD("reference", needs, *call, *of_backward(z, torch.zeros_like(y)))
        return [(t.dtype, t.shape, t.stride()) for t in (y, z, *found)]

    real = layouts(call)
    assert {dtype for dtype, *_ in real[2:]} == {torch.bfloat16, torch.float32}
    with FakeTensorMode() as mode:
        faked = {name: mode.from_tensor(t) for name, t in given.items()}
        assert layouts(call._replace(**faked)) == real


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_one_op(mode):
    given = {name: t.detach() for name, t in tensors((3,)).items()}
    names = list(given)

    def function(*values):
        return ak.bottleneck_adapter(**dict(zip(names, values, strict=True)))

    graph = make_fx(function, tracing_mode=mode)(*given.values())
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(FORWARD) == 1
    other = {name: t.detach() for name, t in tensors((3,), seed=1).items()}
    torch.testing.assert_close(graph(*other.values()), eager_adapter(**other))


def test_inference_mode_gives_the_same_bits(spy):
    given = tensors((3,))
    expected = ak.bottleneck_adapter(**given)
    with torch.inference_mode():
        y = ak.bottleneck_adapter(**given)
    assert y.is_inference()
    assert torch.equal(y, expected)
    assert spy.forwards == [True, False]


def test_a_tensor_subclass_without_semantics_goes_through_the_kernel(spy):
    class Named(torch.Tensor):
        pass

    given = tensors((3,))
    y = ak.bottleneck_adapter(**{**given, "x": given["x"].as_subclass(Named)})
    assert spy.forwards == [True]
    torch.testing.assert_close(torch.Tensor(y), eager_adapter(**given))


def test_nested_tensors_run_as_plain_operations(spy):
    given = tensors((6,), dtype=torch.float32)
    rows = given["x"].detach()
    nested = torch.nested.nested_tensor([rows[:2], rows[2:]], layout=torch.jagged)
    y = ak.bottleneck_adapter(**{**given, "x": nested})
    torch.testing.assert_close(y.values(), eager_adapter(**given))
    assert not spy.forwards
