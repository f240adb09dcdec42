"""The norm behind an adapter, as torch sees the call: `bottleneck_adapter_norm`."""

import io
import itertools

import pytest
import torch
from eager import eager_adapter, eager_adapter_norm, tensors
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adapterkern as ak
from adapterkern import dispatch
from adapterkern.results import Needs

EXACT = {"rtol": 1e-10, "atol": 1e-12}
VARIANTS = {
    "layer": {"norm": "layer", "eps": 1e-3},
    "layer-without-parameters": {"norm": "layer", "norm_weight": None, "norm_bias": None},
    "layer-without-bias": {"norm": "layer", "norm_bias": None},
    "rms": {"norm": "rms", "norm_bias": None, "eps": 1e-3},
    "rms-without-weight": {"norm": "rms", "norm_weight": None, "norm_bias": None},
}
MIXES = {
    "input": {},
    "tensor-skip": {"residual": True, "skip": True, "scaling": 10},
    "learned": {"scaling": 1, "bias": False},
}


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """The plain op with torch's norm, and the hand-written norm."""
    return request.param


def arguments(shape=(3, 5), norm="layer", **options):
    given = tensors(shape, norm=True, **options)
    if norm == "rms":
        del given["norm_bias"]
    return given


def gradients_of(function, given, upstream, **options):
    """The outputs and every gradient; an output without an upstream gradient is not used."""
    leaves = {n: t.detach().requires_grad_() for n, t in given.items() if t is not None}
    outputs = function(**leaves, **options, **{n: None for n, t in given.items() if t is None})
    used = [(o, d) for o, d in zip(outputs, upstream, strict=True) if d is not None]
    results, gradients = zip(*used, strict=True)
    found = torch.autograd.grad(results, list(leaves.values()), gradients, allow_unused=True)
    return outputs, dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_both_outputs_and_every_gradient_equal_those_of_plain_layers(variant, mix, backend):
    given = tensors((3, 5), norm=True, **mix)
    options = {n: v for n, v in variant.items() if n not in given}
    given |= {n: None for n in variant if n in given}
    for used in [(True, True), (True, False), (False, True)]:
        upstream = [torch.randn(3, 5, 10, dtype=torch.float64) if use else None for use in used]
        outputs, found = gradients_of(
            ak.bottleneck_adapter_norm, given, upstream, prenorm=True, backend=backend, **options
        )
        wanted, expected = gradients_of(
            eager_adapter_norm, given, upstream, prenorm=True, **options
        )
        torch.testing.assert_close(outputs, wanted, **EXACT)
        for name, gradient in found.items():
            if expected[name] is None:  # of the norm's parameters, where the stream alone is used
                assert name.startswith("norm_")
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(gradient, expected[name], **EXACT, msg=name)


def test_without_prenorm_the_norm_alone_is_returned(backend):
    given = arguments()
    normed = ak.bottleneck_adapter_norm(**given, backend=backend)
    torch.testing.assert_close(normed, eager_adapter_norm(**given), **EXACT)


@pytest.mark.parametrize("cast", [False, True])
def test_an_offset_and_an_early_cast_are_those_of_gemma_and_llama(backend, cast):
    """Gemma multiplies with 1 + w in float32 and then rounds, Llama rounds before w."""
    given = {n: t.bfloat16() for n, t in arguments((64,), "rms").items()}
    stream = eager_adapter(**{n: t for n, t in given.items() if n != "norm_weight"})
    wide = stream.float() * (stream.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    weight = given["norm_weight"]
    gemma = (wide * (1.0 + weight.float())).bfloat16()
    llama = weight * wide.bfloat16()
    offset = 0.0 if cast else 1.0
    normed = ak.bottleneck_adapter_norm(
        **given, norm="rms", eps=1e-6, weight_offset=offset, cast_before_weight=cast,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(normed, llama if cast else gemma)
    other = (wide * weight.float()).bfloat16()
    assert not torch.equal(llama, other)  # the order of cast and weight shows in these numbers


NEEDED = ("x", "down_weight", "up_bias", "skip", "norm_weight", "norm_bias")
SUBSETS = [*itertools.combinations(NEEDED, 2), ("x",), ("skip",), ("norm_weight",)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_only_what_is_asked_for_is_computed_and_saved(spy, wanted):
    given = arguments((6,), skip=True)
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in given.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normed = ak.bottleneck_adapter_norm(**leaves)
    dy = torch.randn_like(normed)
    found = torch.autograd.grad(normed, [leaves[name] for name in wanted], dy)
    plain = {n: t.detach().requires_grad_(n in wanted) for n, t in given.items()}
    expected = torch.autograd.grad(
        eager_adapter_norm(**plain), [plain[name] for name in wanted], dy
    )
    torch.testing.assert_close(found, expected, **EXACT)
    assert spy.backwards == [Needs(**dict.fromkeys(wanted, True))]
    wide = [t for t in kept if t.shape == normed.shape]
    assert len(wide) == ("down_weight" in wanted) + (set(wanted) != {"norm_bias"})  # x, the stream
    statistics = [t for t in kept if t.shape == (6,)]
    assert len(statistics) == 2


def test_a_norm_whose_bias_alone_is_trained_keeps_nothing(spy):
    given = {n: t.detach().requires_grad_(n == "norm_bias") for n, t in arguments((6,)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normed = ak.bottleneck_adapter_norm(**given)
    normed.sum().backward()
    assert torch.equal(given["norm_bias"].grad, torch.full((10,), 6.0, dtype=torch.float64))
    assert not kept
    assert spy.forwards == [False]


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses_costs_its_backward_nothing(spy, used):
    """No zeros are made for it; of the stream alone, there is no norm to go back through."""
    asked = []
    backward = spy.backward
    spy.backward = lambda *arguments: asked.append(arguments) or backward(*arguments)
    outputs = ak.bottleneck_adapter_norm(**arguments(), prenorm=True)
    outputs[used].sum().backward()
    ((call, saved, upstream, _),) = asked
    assert (upstream.y is None, upstream.normed is None) == (used == 0, used == 1)
    assert (call.norm, saved.rstd is None) == (("layer", False) if used == 0 else ("none", True))


def test_the_stream_is_written_only_where_something_reads_it(spy):
    given = {n: t.detach() for n, t in arguments((6,)).items()}
    outputs = []
    forward = spy.forward
    spy.forward = lambda call, save: outputs.append(forward(call, save)) or outputs[-1]
    ak.bottleneck_adapter_norm(**given)
    ak.bottleneck_adapter_norm(**given, prenorm=True)
    ak.bottleneck_adapter_norm(**given | {"x": given["x"].requires_grad_()})
    assert [found.y is not None for found, _ in outputs] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_plain_layers(backend, dtype):
    given = {n: t.detach().float() for n, t in arguments().items()}
    given["x"] = given["x"].to(dtype)
    norm = {n: given.pop(n) for n in ("norm_weight", "norm_bias")}
    with torch.autocast("cpu", torch.bfloat16):
        normed, stream = ak.bottleneck_adapter_norm(**given, **norm, prenorm=True, backend=backend)
        expected = eager_adapter(**given)
    assert (stream.dtype, normed.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(stream, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        normed, F.layer_norm(stream.float(), (10,), *norm.values()), rtol=2e-2, atol=2e-2
    )


@pytest.mark.sweep("tier", "prenorm", "backend")
@pytest.mark.parametrize("tier", ["aot_eager", "inductor"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_compiled_calls_equal_eager_ones(recompiled, tier, prenorm, backend):
    @torch.compile(fullgraph=True, backend=tier)
    def compiled(**given):
        return ak.bottleneck_adapter_norm(**given, prenorm=prenorm, backend=backend)

    # residual and skip have one gradient, which an op may not return twice.
    given = arguments(residual=True, skip=True)
    found, expected = compiled(**given), eager_adapter_norm(**given, prenorm=prenorm)
    torch.testing.assert_close(found, expected, **EXACT)
    # Of the two outputs one alone, and both.
    picks = (lambda o: o[0], lambda o: o[1], lambda o: o[0] * o[1]) if prenorm else (lambda o: o,)
    for pick in picks:
        pairs = [
            torch.autograd.grad(
                pick(o).square().sum(), list(given.values()), retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )
            for o in (found, expected)
        ]  # fmt: skip
        torch.testing.assert_close(*pairs, **EXACT)


def test_a_changing_scaling_compiles_twice(recompiled):
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(scaling, given):
        return ak.bottleneck_adapter_norm(**given, scaling=scaling, backend="reference")

    given = arguments()
    for scaling in (0.5, 0.25, 0.125, 2.0):
        torch.testing.assert_close(
            compiled(scaling, given), eager_adapter_norm(**given, scaling=scaling), **EXACT
        )
    assert counter.frame_count == 2


def test_an_exported_program_runs_without_the_package(backend):
    class Layer(torch.nn.Module):
        def forward(self, **given):
            return ak.bottleneck_adapter_norm(**given, prenorm=True)

    given = {n: t.detach() for n, t in arguments().items()}
    program = torch.export.export(Layer(), (), given)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    assert "adapterkern" not in str(program.graph)
    stored.seek(0)
    found = torch.export.load(stored).module()(**given)
    torch.testing.assert_close(found, eager_adapter_norm(**given, prenorm=True), **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_gradients(backend, reentrant):
    given = arguments()
    values = list(given.values())

    def layer(*values):
        named = dict(zip(given, values, strict=True))
        return ak.bottleneck_adapter_norm(**named, backend=backend)

    found = torch.autograd.grad(
        checkpoint(layer, *values, use_reentrant=reentrant).square().sum(), values
    ) if not reentrant else None  # fmt: skip
    if reentrant:  # which allows backward() alone
        leaves = [v.detach().requires_grad_() for v in values]
        checkpoint(layer, *leaves, use_reentrant=True).square().sum().backward()
        found = [leaf.grad for leaf in leaves]
    expected = torch.autograd.grad(eager_adapter_norm(**given).square().sum(), values)
    torch.testing.assert_close(list(found), list(expected), **EXACT)


def test_functorch_and_forward_ad_run_plain_operations(spy):
    given = {n: t.detach() for n, t in arguments((6,)).items()}
    rest = {n: t for n, t in given.items() if n != "x"}

    def fused(x):
        return ak.bottleneck_adapter_norm(x, **rest)

    def plain(x):
        return eager_adapter_norm(x, **rest)

    x, tangent = given["x"], torch.randn_like(given["x"])
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: torch.func.jacrev(f)(x),
    ):
        torch.testing.assert_close(transform(fused), transform(plain), **EXACT)
    assert not spy.forwards


def test_dropout_comes_before_the_norm():
    given = {n: t.detach() for n, t in arguments((200,), residual=True).items()}
    torch.manual_seed(3)
    found, stream = ak.bottleneck_adapter_norm(**given, dropout=0.5, prenorm=True)
    dropped = (stream - given["residual"]).eq(0).double().mean()
    assert 0.45 < dropped < 0.55
    norm = given["norm_weight"], given["norm_bias"]
    torch.testing.assert_close(found, F.layer_norm(stream, (10,), *norm), **EXACT)


def test_a_mean_far_from_zero_costs_no_digits(backend):
    """The variance is that of the centered row, not a difference of two large sums."""
    given = {n: t.detach().float() for n, t in arguments((64,), skip=True).items()}
    given["skip"] += 4096.0
    normed, stream = ak.bottleneck_adapter_norm(**given, prenorm=True, backend=backend)
    exact = F.layer_norm(
        stream.double(), (10,), given["norm_weight"].double(), given["norm_bias"].double()
    )
    # The mean has the error of a digit of the rows, a variance from sums of squares one of 1.
    torch.testing.assert_close(normed.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(backend, tokens):
    given = arguments((tokens,))
    outputs, found = gradients_of(
        ak.bottleneck_adapter_norm, given, [torch.ones(tokens, 10, dtype=torch.float64), None],
        prenorm=True, backend=backend,
    )  # fmt: skip
    assert [o.shape for o in outputs] == [(tokens, 10)] * 2
    if tokens == 0:
        assert all(not gradient.any() for gradient in found.values())
        assert {n: g.shape for n, g in found.items()} == {n: t.shape for n, t in given.items()}


def test_the_same_call_gives_the_same_bits():
    given = {n: t.float() for n, t in arguments((37,)).items()}
    runs = [
        gradients_of(
            ak.bottleneck_adapter_norm, given, [torch.ones(37, 10)] * 2, prenorm=True,
            backend="reference",
        )
        for _ in range(2)
    ]  # fmt: skip
    for (outputs, found), (again, found_again) in itertools.pairwise(runs):
        assert all(map(torch.equal, outputs, again))
        assert all(torch.equal(found[name], found_again[name]) for name in found)


WRONG = {
    "norm": ({"norm": "batch"}, 'norm must be "layer" or "rms"'),
    "eps": ({"eps": 0.0}, "eps must be a number above 0 and finite, got 0.0"),
    "eps-none": ({"eps": None}, "eps must be a number above 0, got None"),
    "offset": ({"weight_offset": float("inf")}, "weight_offset must be finite"),
    "width": ({"norm_weight": torch.ones(9).double()}, r"norm_weight must have shape \[10\]"),
    "matrix": ({"norm_bias": torch.ones(1, 10).double()}, r"use norm_bias.reshape\(10\)"),
    "dtype": ({"norm_weight": torch.ones(10)}, "float64 does not mix with other types"),
    "integer": ({"norm_weight": torch.ones(10).long()}, "must be a floating-point tensor"),
    "device": ({"norm_weight": torch.ones(10, device="meta").double()}, "must be on one device"),
    "kind": ({"norm_weight": 1.0}, "norm_weight must be a torch.Tensor, got float"),
    "backend": ({"backend": "cuda"}, 'backend "cuda" cannot run this call'),
}


@pytest.mark.parametrize("change", WRONG)
def test_bad_input_is_told_with_its_cure(change):
    wrong, message = WRONG[change]
    with pytest.raises((ValueError, TypeError, ak.BackendUnsupportedError), match=message):
        ak.bottleneck_adapter_norm(**arguments() | wrong)


def test_where_no_kernel_takes_the_norm_one_takes_all_else(spy, monkeypatch):
    """On a GPU: the plain op of a kernel, and torch's norm behind it."""
    monkeypatch.setattr(type(spy), "features", spy.features - {"layer_norm", "rms_norm"})
    given = arguments((6,))
    found = ak.bottleneck_adapter_norm(**given)
    torch.testing.assert_close(found, eager_adapter_norm(**given), **EXACT)
    assert spy.forwards == [True]
    with pytest.raises(ak.BackendUnsupportedError, match='feature "layer_norm"'):
        ak.bottleneck_adapter_norm(**given, backend="triton")
    monkeypatch.setattr(dispatch, "_decisions", {})
    with ak.use_backend("reference"):
        ak.bottleneck_adapter_norm(**given)
    assert len(spy.forwards) == 1


@pytest.mark.thorough
def test_numbers_that_change_from_call_to_call_compile(recompiled):
    """With dynamic=True the defaults of the function are such numbers too."""
    given = arguments()
    compiled = torch.compile(
        ak.bottleneck_adapter_norm, backend="aot_eager", dynamic=True, fullgraph=True
    )
    for options in ({}, {"eps": 0.3, "weight_offset": 1.0}, {"eps": 0.7, "weight_offset": 0.5}):
        expected = ak.bottleneck_adapter_norm(**given, **options)
        torch.testing.assert_close(compiled(**given, **options), expected, **EXACT)
