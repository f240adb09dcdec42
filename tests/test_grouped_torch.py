"""Many adapters as torch sees them: ops, autograd, transforms, and what spoils a backward."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from banks import bank_of, one_at_a_time, routed
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import adapterkern as ak
from adapterkern.grouped import ops
from adapterkern.grouped.call import GroupedNeeds, make_grouped_call

FORWARD = torch.ops.adapterkern.grouped_forward.default
BACKWARD = torch.ops.adapterkern.grouped_backward.default
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ["full", "narrow", None, "thin", "narrow"]


def call_of(dtype=torch.float32, bare=False, gradient=True):
    """x [5, 6], two slots of at most four units, one of them narrower."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(gradient)

    routing = ak.AdapterRouting(7, 2).update([1, -1, 0, 1, 1])
    biases = (None, None) if bare else (normal(2, 4), normal(2, 6))
    skip = None if bare else normal(5, 6)
    wide = torch.promote_types(dtype, torch.float32)
    scalings = None if bare else torch.tensor([0.5, 2.0], dtype=wide).requires_grad_(gradient)
    ranks = None if bare else torch.tensor([4, 3], dtype=torch.int32)
    return make_grouped_call(
        normal(5, 6), normal(2, 4, 6), normal(2, 6, 4), *biases, None if bare else "input", skip,
        scalings, ranks, routing.buffers(), "gelu", False,
    )  # fmt: skip


CALLS = {"whole": {}, "bare": {"bare": True}, "bf16": {"dtype": torch.bfloat16}}


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_grouped_forward_op_passes_opcheck(options, save):
    call = call_of(**options, gradient=save)
    torch.library.opcheck(FORWARD, ("reference", save, [], [], [], *call))


def test_grouped_forward_op_with_leaves_passes_opcheck():
    call = call_of(gradient=False)._replace(gradient=True)
    leaf = call.up_weights[1, :, :3].detach().clone().requires_grad_()
    scaling = torch.tensor([2.0], requires_grad=True)
    torch.library.opcheck(FORWARD, ("reference", True, [leaf, scaling], [1, 4], [1, 1], *call))


@pytest.mark.parametrize("needs", [GroupedNeeds(*[True] * 8), GroupedNeeds(x=True, skip=True)])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_grouped_backward_op_passes_opcheck(options, needs):
    call = call_of(**options, gradient=False)
    y, z = FORWARD("reference", True, [], [], [], *call)
    given = [t is not None for t in call.tensors().values()]
    asked = [need and there for need, there in zip(needs, given, strict=False)]
    asked = list(GroupedNeeds(*asked)._replace(residual=False, skip=False))
    arguments = "reference", asked, *call.for_backward(GroupedNeeds(*asked)), z, torch.ones_like(y)
    torch.library.opcheck(BACKWARD, arguments)


def test_ops_of_a_bank_appear_by_name_in_the_profiler():
    bank, x = bank_of(), torch.randn(5, 16)
    with torch.profiler.profile() as profile:
        bank(x, routed(bank, NAMES)).sum().backward()
    names = [event.name for event in profile.events()]
    assert names.count("adapterkern::grouped_forward") == 1
    assert names.count("adapterkern::grouped_backward") == 1


def function_of(routing, ranks, **options):
    def function(x, down, up, down_biases, up_biases, scalings):
        return ak.grouped_bottleneck_adapter(
            x, down, up, routing, down_biases, up_biases, ranks, scalings=scalings, **options
        )

    return function


@pytest.fixture
def in_float64():
    call = call_of(torch.float64)
    routing = ak.AdapterRouting(5, 2).update([1, -1, 0, 1, 1])
    tensors = (
        call.x, call.down_weights, call.up_weights, call.down_biases, call.up_biases, call.scalings,
    )  # fmt: skip
    return function_of(routing, call.ranks, activation="tanh"), tensors


def test_gradients_and_their_gradients_are_those_of_differences(in_float64):
    function, tensors = in_float64
    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors)


def test_forward_mode_gives_the_directional_derivative(in_float64):
    function, tensors = in_float64
    values = tuple(t.detach() for t in tensors)
    along = tuple(torch.ones_like(t) for t in values)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, along, strict=True)]
        found = forward_ad.unpack_dual(function(*duals)).tangent
    _, wanted = jvp(function, values, along)
    step = 1e-6
    nudged = [t + step * a for t, a in zip(values, along, strict=True)]
    differences = (function(*nudged) - function(*values)) / step
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, differences, rtol=1e-4, atol=1e-4)
    assert found.abs().sum() > 1


def test_grad_of_torch_func_is_that_of_autograd(in_float64):
    function, tensors = in_float64
    wanted = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    found = grad(lambda *a: function(*a).square().sum(), argnums=tuple(range(6)))(*tensors)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


def test_vmap_over_x_is_right(in_float64):
    function, (x, *others) = in_float64
    many = torch.stack([x.detach(), 2 * x.detach()])
    y = vmap(lambda one: function(one, *others))(many)
    torch.testing.assert_close(y, torch.stack([function(one, *others) for one in many]))


def test_functional_call_and_its_gradient_use_the_parameters_that_are_given():
    bank, x = bank_of(dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    routing = routed(bank, NAMES)
    bank(x, routing)
    other = {n: torch.randn_like(p).requires_grad_() for n, p in bank.named_parameters()}
    twin = bank_of(dtype=torch.float64)
    twin.load_state_dict(other, strict=False)
    y = functional_call(bank, other, (x, routing))
    torch.testing.assert_close(y, one_at_a_time(twin, x, NAMES))
    y.square().sum().backward()
    found = grad(lambda p: functional_call(bank, p, (x, routing)).square().sum())(other)
    one_at_a_time(twin, x, NAMES).square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(other[name].grad, parameter.grad)
        torch.testing.assert_close(found[name], parameter.grad)
    assert not torch.allclose(bank(x, routing), y)


def test_a_bank_is_differentiated_twice_as_its_adapters_are():
    bank = bank_of(dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def penalty(y):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [bank["narrow"].up_proj.weight, x])

    found = penalty(bank(x, routed(bank, NAMES)))
    for gradient, want in zip(found, penalty(one_at_a_time(bank, x, NAMES)), strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("trained", ["", "up_proj.weight", "up_proj.bias", "down_proj.bias"])
def test_a_bank_with_frozen_parts_is_differentiated_twice(trained):
    bank = bank_of(dtype=torch.float64)
    for key, parameter in bank.named_parameters():
        parameter.requires_grad_(bool(trained) and key.endswith(trained))
    parts = [p for p in bank["narrow"].parameters() if p.requires_grad]
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def twice(run, inputs):
        first = torch.autograd.grad(run().square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for rows, inputs in ((x, [x, skip, *parts]), (x.detach(), [skip, *parts])):
        found = twice(partial(bank, rows, routed(bank, NAMES), skip), inputs)
        wanted = twice(partial(one_at_a_time, bank, rows, NAMES, skip), inputs)
        for gradient, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("skip", [False, True])
def test_autocast_gives_the_dtypes_and_values_of_adapters_called_alone(skip):
    bank, x = bank_of(), torch.randn(5, 16)
    skip = torch.randn(5, 16) if skip else None
    with torch.autocast("cpu", torch.bfloat16):
        y = bank(x, routed(bank, NAMES), skip)
        wanted = one_at_a_time(bank, x, NAMES, skip)
    assert y.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    assert not torch.equal(y, bank(x, routed(bank, NAMES), skip))
    half = bank.bfloat16()(x.bfloat16(), routed(bank, NAMES))
    assert half.dtype == torch.bfloat16


def meta_bank():
    bank = ak.AdapterBank(16, 8, 5, device="meta")
    bank.add("narrow", ak.BottleneckAdapter(16, 5, device="meta"))
    return bank, ak.AdapterRouting(5, 5, device="meta").update(bank.ids(["narrow"] * 3))


def fake_bank():
    bank = ak.AdapterBank(16, 8, 5)
    bank.add("narrow", ak.BottleneckAdapter(16, 5))
    return bank, ak.AdapterRouting(5, 5).update(bank.ids(["narrow"] * 3))


@pytest.mark.parametrize(("mode", "made"), [("meta", meta_bank), ("fake", fake_bank)])
def test_shapes_and_dtypes_are_those_of_a_real_bank(mode, made):
    real = bank_of({"narrow": 5})
    x = torch.randn(3, 16, requires_grad=True)
    y = real(x, routed(real, ["narrow"] * 3))
    y.sum().backward()
    with torch.device("meta") if mode == "meta" else FakeTensorMode():
        bank, routing = made()
        other = torch.randn(3, 16, requires_grad=True)
        no_values = bank(other, routing)
        no_values.sum().backward()
    pairs = [(no_values, y), (other.grad, x.grad)]
    pairs += [
        (p.grad, q.grad)
        for p, q in zip(bank.parameters(), real["narrow"].parameters(), strict=True)
    ]
    for found, wanted in pairs:
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


SPOILT = (
    "\n  hint: an AdapterRouting that is updated, and a bank that gets or loses an adapter or "
    "steps one, between a forward and its backward spoil that backward; give each batch that waits "
    "for its backward a routing of its own, and step after the last."
)  # fmt: skip


def step(bank, routing):
    for parameter in bank["narrow"].parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(bank.parameters(), lr=0.1).step()


CHANGES = {
    "update": lambda bank, routing: routing.update(bank.ids(NAMES)),
    "increment": lambda bank, routing: torch.autograd.graph.increment_version(routing.order),
    "add": lambda bank, routing: bank.add("more", ak.BottleneckAdapter(16, 5)),
    "remove": lambda bank, routing: bank.remove("unused"),
    "step": step,
    "load": lambda bank, routing: bank.load_state_dict(bank.state_dict()),
}


@pytest.mark.parametrize("moved", [False, True], ids=["at-first", "moved"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_forward_and_backward_is_an_error_with_its_cure(change, moved):
    bank = bank_of({"full": 8, "narrow": 5, "thin": 1, "unused": 4})
    if moved:  # its parameters then have version counters of their own
        bank.double().float()
    routing = routed(bank, NAMES)
    y = bank(torch.randn(5, 16), routing)
    change(bank, routing)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        y.sum().backward()
    assert SPOILT in str(caught.value)


@pytest.mark.parametrize("moved", [False, True], ids=["at-first", "moved"])
def test_a_frozen_adapter_that_changes_before_the_backward_is_an_error(moved):
    bank, x = bank_of().requires_grad_(False), torch.randn(5, 16, requires_grad=True)
    if moved:
        bank.double().float()
    y = bank(x, routed(bank, NAMES))
    bank["narrow"].down_proj.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_of_an_adapter_that_is_set_aside_leaves_a_backward_right():
    bank, x = bank_of(), torch.randn(2, 16)
    y = bank(x, routed(bank, ["full", "narrow"]))
    wanted = torch.autograd.grad(y.sum(), bank["narrow"].up_proj.weight, retain_graph=True)
    with torch.no_grad():
        bank["thin"].scaling = 3.0  # written at the next call
    found = torch.autograd.grad(y.sum(), bank["narrow"].up_proj.weight)
    torch.testing.assert_close(found, wanted)


def test_threads_with_routings_of_their_own_share_a_bank():
    bank = bank_of()
    mixes = (["full", None, "thin"] * 5, ["narrow", "narrow", "full"] * 4)
    ready = threading.Barrier(2)

    def run(names):
        generator = torch.Generator().manual_seed(len(names))
        x = torch.randn(len(names), 16, generator=generator)
        ready.wait(60)
        found = [bank(x, routed(bank, names)) for _ in range(30)]
        return x, found

    with ThreadPoolExecutor(2) as pool:
        for (x, found), names in zip(pool.map(run, mixes), mixes, strict=True):
            wanted = one_at_a_time(bank, x, names)
            for y in found:
                torch.testing.assert_close(y, wanted, **CLOSE)
    assert len(bank._routings) <= 60


def test_leaves_that_are_not_used_are_not_asked_for():
    bank = bank_of()
    bank["narrow"].up_proj.requires_grad_(False)
    call, leaves = bank._prepared(torch.randn(1, 16), routed(bank, ["narrow"]), None, None)
    assert call.gradient
    assert [ops.KINDS[kind] for kind in leaves.kinds] == list(ops.KINDS[:4])
    assert set(leaves.slots) == {1}
    with torch.no_grad():
        call, leaves = bank._prepared(torch.randn(1, 16), routed(bank, ["narrow"]), None, None)
    assert leaves is ops.NO_LEAVES
    assert not call.gradient
