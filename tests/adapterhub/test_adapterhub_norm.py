"""The LayerNorm that a post-LN block runs behind its adapter, in the adapter's own pass.

On the CPU no kernel takes it. Here the named reference does, whose norm is written by hand.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapterhub_oracle as oracle
import adapters.composition as ac
from adapterhub_models import bert, run
from host_work import Operations
from test_adapterhub_oracle import OTHER_CONFIGS, PRESETS, calls_of, placed

import adapterkern as ak
from adapterkern.backends.base import FIRST_FEATURES
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import eligibility

POST_LN = ("bert", "distilbert", "bart")
KINDS = {
    **{name: config for name, config in PRESETS.items() if name != "p_seq_bn_inv"},
    **{name: OTHER_CONFIGS[name] for name in ("post_add", "after_norm", "no_original_ln", "mam")},
    "after_both": "double_seq_bn[reduction_factor=4,original_ln_before=True]",
    "of_the_input": "seq_bn[reduction_factor=4,residual_before_ln=False,original_ln_after=True]",
    "channel_parallel": "par_bn[scaling='channel']",
    "parallel_alone": "par_bn[original_ln_after=False]",
}
TWO = ("p_seq_bn", "p_double_seq_bn")
# Where the block has no norm behind the adapter, or the library's code must add up.
WITHOUT_A_NORM = {"p_adapter_plus", "no_original_ln", "post_add", "parallel_alone"}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def kernel_with_norms():
    with ak.use_backend("reference"):
        yield


@torch.no_grad()
def randomise_norms(model):
    """As the adapters are, so that no part of any norm can be left out or taken from another."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.eps = 0.1 + 0.1 * torch.rand(1, generator=generator).item()
            for parameter in module.parameters():
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) / 2)
    return model


def post_ln_model(name, config, mode):
    model = models.build(name)
    model.add_adapter("a", config=config)
    models.randomise_adapters(model)
    model.train_adapter("a")
    return placed(randomise_norms(model), mode, "cpu")


CASES = [
    *[("bert", kind, mode, True) for kind in KINDS for mode in ("float32", "autocast", "bfloat16")],
    *[(name, kind, "float32", True) for name in POST_LN[1:] for kind in TWO],
    *[("bert", kind, mode, False) for kind in TWO for mode in ("float32", "autocast")],
]


@pytest.mark.sweep("name", "kind", "mode", "trained_norm")
@pytest.mark.parametrize(("name", "kind", "mode", "trained_norm"), CASES)
@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
def test_layers_agree_with_stock_and_hold_the_norm(name, kind, mode, trained_norm, counted):
    model = post_ln_model(name, KINDS[kind], mode)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.requires_grad_(trained_norm)
    model.train(trained_norm)  # whose dropout lies outside of the layers
    calls = calls_of(model, name, mode)
    counted.clear()
    assert oracle.compare(model, calls) == {"reference"}
    assert len(counted) == 2 * len(calls)  # with gradients, and without
    of_norm = {call.norm for call in counted}
    assert of_norm == ({"none"} if kind in WITHOUT_A_NORM else {"layer"})


def without_skip(call):
    return call._replace(skip=None)


def with_the_default_eps(call):
    return call._replace(eps=1e-5)


def with_another_weight(call):
    return call._replace(norm_weight=call.norm_weight.flip(0))


def without_bias(call):
    return call._replace(norm_bias=None)


def with_the_norm_frozen(call):
    return call._replace(norm_weight=call.norm_weight.detach())


def without_norm(call):
    return call.without_norm()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (kind, fault)
        for kind in ("p_seq_bn", "p_double_seq_bn", "p_par_bn", "of_the_input")
        for fault in (
            without_skip, with_the_default_eps, with_another_weight, without_bias,
            with_the_norm_frozen,
        )
        if kind != "p_seq_bn" or fault is not without_skip  # it has none: t is at hand
    ],
)  # fmt: skip
def test_the_oracle_fails_a_wrong_norm(kind, fault, monkeypatch):
    model = post_ln_model("bert", KINDS[kind], "float32")
    model.requires_grad_(True)
    calls = calls_of(model, "bert", "float32")
    oracle.change_calls(monkeypatch, fault)
    with pytest.raises(oracle.OracleError, match=r"is off by|only one of"):
        oracle.compare(model, calls)


def test_several_adapters_keep_the_library_s_norm(counted):
    model = randomise_norms(bert("seq_bn", "seq_bn"))
    for setup in (
        ac.Stack("a", "b"),
        ac.BatchSplit("a", "b", batch_sizes=[1, 3]),
        ac.Parallel("a", "b"),
        ac.Average("a", "b", weights=[0.3, 0.7]),
    ):
        model.set_active_adapters(setup)
        expected = run(model)
        with adapterhub.patched(model):
            torch.testing.assert_close(run(model), expected, **CLOSE)
    assert {call.norm for call in counted} == {"none"}


@torch.no_grad()
def test_a_post_ln_layer_is_one_operation(spy):
    """Under "auto", where a kernel takes the norm too."""
    model = randomise_norms(bert("double_seq_bn"))
    layer = model.get_submodule("encoder.layer.0.output")
    given = *torch.randn(2, 2, 3, models.HIDDEN), layer.LayerNorm
    expected = layer.bottleneck_layer_forward(*given)
    with ak.use_backend("auto"), adapterhub.patched(model), Operations() as patched:
        found = layer.bottleneck_layer_forward(*given)
    assert patched.names == ["adapterkern.forward"]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert spy.forwards == [False]


@torch.no_grad()
@pytest.mark.parametrize("knows_norms", [True, False], ids=["declines", "knows-none"])
@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_a_backend_without_this_norm_runs_the_rest(spy, monkeypatch, counted, wanted, knows_norms):
    if knows_norms:

        def limits(spec):
            return ["too wide"] if "layer_norm" in spec.features else []

        monkeypatch.setattr(spy, "limits", limits, raising=False)
    else:
        monkeypatch.setattr(spy, "features", FIRST_FEATURES, raising=False)
    model = randomise_norms(bert("double_seq_bn"))
    expected = run(model)
    with ak.use_backend(wanted), adapterhub.patched(model):
        torch.testing.assert_close(run(model), expected, **CLOSE)
        rows = adapterhub.explain(model).rows
    assert len(spy.forwards) == 4
    named = "triton" if wanted == "auto" else "triton (named)"
    assert {(row.runs_on, row.norm) for row in rows} == {(named, "no_kernel")}


# What must be called keeps to be called


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def make_it_another_class(norm):
    norm.__class__ = Doubled


def hook_it(norm):
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_its_gradient(norm):
    norm.register_full_backward_hook(lambda module, d_inputs, d_outputs: None)


def override_it(norm):
    norm.forward = lambda x: 2 * nn.functional.layer_norm(x, norm.normalized_shape)


def give_it_no_eps(norm):
    norm.eps = 0.0


def give_it_an_eps_that_is_no_float(norm):
    norm.eps = 1


def let_it_normalise_sequences(norm):
    shape = (models.TOKENS, models.HIDDEN)
    norm.normalized_shape = shape
    for name, parameter in norm.named_parameters():
        setattr(norm, name, nn.Parameter(parameter.expand(shape).clone()))


def take_its_parameters(norm):
    for name in ("weight", "bias"):
        norm.__dict__[name] = norm._parameters.pop(name)


def subclass_its_weight(norm):
    class Tagged(torch.Tensor):
        pass

    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Tagged))


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (make_it_another_class, "norm_class"),
        (hook_it, "norm_hooks"),
        (hook_its_gradient, "norm_hooks"),
        (override_it, "norm_hooks"),
        (give_it_no_eps, "norm_numbers"),
        (give_it_an_eps_that_is_no_float, "norm_numbers"),
        (let_it_normalise_sequences, "norm_numbers"),
        (take_its_parameters, "norm_parameters"),
        (subclass_its_weight, "norm_parameters"),
    ],
)
def test_a_norm_that_is_more_than_it_looks_runs_as_it_is(counted, change, code):
    model = randomise_norms(bert())
    adapterhub.patch(model)
    run(model)
    assert [call.norm for call in counted] == ["layer", "layer"]
    counted.clear()
    change(model.encoder.layer[0].output.LayerNorm)  # when it has been fused
    found = run(model)
    assert counted.pop(0).norm == "none"
    assert {call.norm for call in counted} <= {"layer"}
    rows = adapterhub.explain(model).rows
    assert [row.norm for row in rows] == [code, "LayerNorm in the same pass"]
    assert f"\n  {code}: " in str(adapterhub.explain(model))
    adapterhub.unpatch()
    expected = run(model)
    assert type(found) is type(expected)
    plain = [tensor.as_subclass(torch.Tensor) for tensor in (found, expected)]
    torch.testing.assert_close(*plain, **CLOSE)


def test_a_norm_that_is_replaced_or_shared_is_read_at_each_call(counted):
    model = randomise_norms(bert())
    adapterhub.patch(model)
    before = run(model)
    norms = [layer.output for layer in model.encoder.layer]
    norms[0].LayerNorm = norms[1].LayerNorm
    shared = run(model)
    norms[1].LayerNorm = nn.LayerNorm(models.HIDDEN, elementwise_affine=False, eps=0.5)
    bare = run(model)
    with torch.no_grad():
        norms[0].LayerNorm.weight.mul_(2)
    found = [shared, bare, run(model)]
    assert [call.norm for call in counted] == ["layer"] * 8
    adapterhub.unpatch()
    assert not torch.allclose(before, shared, atol=1e-2)
    torch.testing.assert_close(found[2], run(model), **CLOSE)
    with torch.no_grad():
        norms[0].LayerNorm.weight.div_(2)
    torch.testing.assert_close(found[1], run(model), **CLOSE)
    norms[1].LayerNorm = norms[0].LayerNorm
    torch.testing.assert_close(found[0], run(model), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_of_another_dtype_gives_what_it_gives(counted, dtype):
    """torch keeps the dtype of the stream, and refuses one wider than the norm's parameters."""
    model = randomise_norms(bert()).to(dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    layer = model.get_submodule("encoder.layer.0.output").to(dtype)
    layer.LayerNorm.to(other)
    given = *torch.randn(2, 2, 3, models.HIDDEN, dtype=dtype), layer.LayerNorm
    adapter = layer.adapters["a"]
    adapter.original_ln_before = False  # so that the norm comes behind alone

    def result():
        try:
            return layer.bottleneck_layer_forward(*given)
        except RuntimeError as error:
            return str(error)

    expected = result()
    with adapterhub.patched(model):
        found = result()
        assert adapterhub.explain(model).rows[0].norm == "norm_dtype"
    if dtype == torch.float32:
        assert found == expected
    else:
        assert found.dtype == expected.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert [call.norm for call in counted] == ["none"]


@pytest.mark.parametrize("enabled", [False, True])
def test_under_autocast_it_is_asked_what_dtype_a_norm_gives(counted, monkeypatch, enabled):
    """On a GPU float32, whatever the stream is; on the CPU no answer differs from that outside."""
    model = randomise_norms(bert())
    monkeypatch.setattr(eligibility, "dtype_reason", lambda call: "as on a GPU")
    with adapterhub.patched(model), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        run(model)
    assert {call.norm for call in counted} == {"none" if enabled else "layer"}


# Together with the rest


def test_copies_switches_and_folders_keep_their_results(counted, tmp_path):
    model = randomise_norms(bert("seq_bn", "par_bn"))
    adapterhub.patch(model)
    twin = copy.deepcopy(model)
    model.set_active_adapters("b")
    model.save_adapter(str(tmp_path), "b")
    twin.delete_adapter("b")
    twin.load_adapter(str(tmp_path), load_as="b", set_active=True)
    found = run(model), run(twin)
    assert [call.norm for call in counted] == ["layer"] * 4
    adapterhub.unpatch()
    expected = run(model)
    for one in found:
        torch.testing.assert_close(one, expected, **CLOSE)
    assert "layer.0.output.LayerNorm.weight" in "".join(model.state_dict())


def gradients_of(model):
    torch.manual_seed(0)  # of the attention dropout
    model.zero_grad()
    model(**models.inputs("bert"))[0].square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_whole_model_gets_the_gradients_of_stock(counted, checkpointing):
    model = randomise_norms(bert("double_seq_bn")).train()
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients_of(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapterhub.patch(model)
    found = gradients_of(model)
    assert [call.norm for call in counted] == ["layer"] * (8 if checkpointing else 4)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = max(expected[name].abs().max().item(), 1.0)
        error = (gradient - expected[name]).abs().max().item()
        assert error <= 1e-4 * scale, name


@pytest.mark.thorough
@pytest.mark.usefixtures("recompiled")
def test_a_compiled_model_is_one_graph_with_the_norms_in_the_operation():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = randomise_norms(bert("double_seq_bn"))
    expected = run(model)
    with adapterhub.patched(model), torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        found = compiled(**models.inputs("bert"))[0]
    assert len(graphs) == 1
    nodes = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len([target for target in nodes if "adapterkern.forward" in target]) == 4
    assert len([target for target in nodes if "layer_norm" in target]) == 1  # of the embeddings
    torch.testing.assert_close(found, expected, **CLOSE)
