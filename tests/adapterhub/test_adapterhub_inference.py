"""A patched model in inference, and what changes from one call to the next: the same results."""

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
from adapterhub_models import bert, inputs, run

from adapterkern.integrations import adapterhub

CLOSE = {"rtol": 0, "atol": 1e-5}


def layer_call(model, *shapes, norm=None):
    """A call of one layer with inputs of its own, as a block of the model makes it."""
    layer = model.get_submodule("encoder.layer.0.output")
    given = [torch.randn(shape) for shape in shapes]
    return layer, lambda: layer.bottleneck_layer_forward(*given, norm)


@torch.no_grad()
def test_each_call_takes_the_autocast_that_it_is_in(counted):
    """The same model and inputs, so that nothing that is remembered may decide it."""
    model = bert()
    outside = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(model)
    assert not torch.equal(inside.float(), outside)
    with adapterhub.patched(model):
        for enabled in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found = run(model)
            expected = inside if enabled else outside
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if enabled else 1e-5)
            dtype = torch.bfloat16 if enabled else torch.float32
            assert {call.compute_dtype for call in counted} == {dtype}
            counted.clear()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
def test_autocast_lets_a_half_precision_adapter_meet_float32(counted):
    model = bert()
    model.adapter_to("a", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        with adapterhub.patched(model):
            found = run(model)
        assert {row.runs_on for row in adapterhub.explain(model).rows} == {"reference"}
    assert len(counted) == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    with adapterhub.patched(model), pytest.raises(RuntimeError, match=r"hint: model\.adapter_to"):
        run(model)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_the_transforms_of_torch_func_see_a_patched_layer(transform, counted):
    model = bert()
    layer, _ = layer_call(model)
    norm = nn.LayerNorm(models.HIDDEN)
    h, inp, tangent = torch.randn(3, 5, 2, 3, models.HIDDEN)

    def one(h, inp):
        return layer.bottleneck_layer_forward(h, inp, norm)

    def apply():
        if transform == "vmap":
            return torch.func.vmap(one)(h, inp)
        if transform == "grad":
            return torch.func.grad(lambda h: one(h, inp[0]).square().sum())(h[0])
        return torch.func.jvp(lambda h: one(h, inp[0]), (h[0],), (tangent[0],))[1]

    expected = apply()
    with adapterhub.patched(model):
        one(h[0], inp[0])  # a plain call first, whose choice must not serve the others
        torch.testing.assert_close(apply(), expected, rtol=0, atol=1e-4)
        one(h[0], inp[0])
    assert len(counted) == 3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
@pytest.mark.parametrize("config", ["seq_bn", "double_seq_bn", "par_bn"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_inputs_that_differ_in_shape_are_the_library_s(counted, config, normed, swapped):
    """It broadcasts them, as PyTorch does."""
    model = bert(f"{config}[reduction_factor=4]")
    norm = nn.LayerNorm(models.HIDDEN) if normed else None
    name = "attention.output" if config == "double_seq_bn" else "output"
    layer = model.get_submodule(f"encoder.layer.0.{name}")
    h, inp = torch.randn(2, 3, models.HIDDEN), torch.randn(1, 1, models.HIDDEN)
    if swapped:
        h, inp = inp, h
    expected = layer.bottleneck_layer_forward(h, inp, norm)
    assert expected.shape == (2, 3, models.HIDDEN)
    with adapterhub.patched(model):
        torch.testing.assert_close(layer.bottleneck_layer_forward(h, inp, norm), expected, **CLOSE)
        counted.clear()
        given = h.expand(expected.shape), inp.expand(expected.shape)
        same = layer.bottleneck_layer_forward(*given, norm)
    torch.testing.assert_close(same, expected, **CLOSE)
    assert [call.x.shape for call in counted] == [expected.shape]


class Tagged(torch.Tensor):
    """A class of its own, with the values of a plain tensor."""


@torch.no_grad()
@pytest.mark.parametrize("which", ["h", "inp"])
@pytest.mark.parametrize("layer_level", [False, True])
def test_tensors_of_a_class_of_their_own_are_the_library_s(counted, which, layer_level):
    model = bert()
    layer, norm = model.get_submodule("encoder.layer.0.output"), nn.LayerNorm(models.HIDDEN)
    given = {name: torch.randn(2, 3, models.HIDDEN) for name in ("h", "inp")}
    given[which] = given[which].as_subclass(Tagged)
    expected = layer.bottleneck_layer_forward(*given.values(), norm)
    with adapterhub.patched(model, layer_level=layer_level):
        found = layer.bottleneck_layer_forward(*given.values(), norm)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not counted


@torch.inference_mode()
def test_inference_mode_gives_the_same(counted):
    model = bert()
    expected = model(**inputs("bert"))[0]
    with adapterhub.patched(model):
        torch.testing.assert_close(model(**inputs("bert"))[0], expected, **CLOSE)
    assert len(counted) == 2


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.layer = model.get_submodule("encoder.layer.0.output")
        self.norm = nn.LayerNorm(models.HIDDEN)

    def forward(self, h, inp):
        return self.layer.bottleneck_layer_forward(h, inp, self.norm)


@pytest.mark.sweep
@torch.no_grad()
@pytest.mark.parametrize("layer_level", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_holds_plain_operations(layer_level, strict):
    model = bert()
    block, given = Block(model).eval(), tuple(torch.randn(2, 2, 3, models.HIDDEN))
    expected = block(*given)
    with adapterhub.patched(model, layer_level=layer_level):
        exported = torch.export.export(block, given, strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "aten.linear.default" in targets
    assert not [target for target in targets if "adapterkern" in target]
    torch.testing.assert_close(exported.module()(*given), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("has_input", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("residual", ["True", "False", "'post_add'"])
def test_what_a_block_may_leave_out_is_the_library_s(normed, has_input, after, before, residual):
    options = f"original_ln_before={before},original_ln_after={after},residual_before_ln={residual}"
    model = bert(f"seq_bn[reduction_factor=4,{options}]")
    layer = model.get_submodule("encoder.layer.0.output")
    h, inp = torch.randn(2, 2, 3, models.HIDDEN)
    norm = nn.LayerNorm(models.HIDDEN) if normed else None
    given = h, inp if has_input else None, norm
    expected = result_of(layer, given)
    with adapterhub.patched(model):
        found = result_of(layer, given)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, **CLOSE)


def result_of(layer, given):
    """The output, or the kind of the error where the library has none for these."""
    try:
        return layer.bottleneck_layer_forward(*given)
    except (TypeError, AttributeError, NameError, RuntimeError) as error:
        return type(error).__name__


@torch.no_grad()
def test_a_hook_on_the_block_s_norm_fires(counted):
    model = bert()
    layer, norm, seen = model.get_submodule("encoder.layer.0.output"), nn.LayerNorm(32), []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(module) or 2 * output)
    given = *torch.randn(2, 2, 3, models.HIDDEN), norm
    expected = layer.bottleneck_layer_forward(*given)
    times = len(seen)
    with adapterhub.patched(model):
        torch.testing.assert_close(layer.bottleneck_layer_forward(*given), expected, **CLOSE)
    assert len(seen) == 2 * times == 4
    assert len(counted) == 1


@pytest.mark.parametrize("layer_level", [True, False])
def test_asked_for_gating_scores_the_library_runs_ungated_adapters_too(counted, layer_level):
    model = bert()
    adapterhub.patch(model, layer_level=layer_level)
    with torch.no_grad(), pytest.warns(adapterhub.FallbackWarning, match="gating_scores"):
        model(**models.inputs("bert"), output_adapter_gating_scores=True)
    assert not counted


def test_a_norm_whose_weights_are_no_parameters_is_called(counted):
    """As in a replica that nn.DataParallel makes."""
    model = bert("double_seq_bn")
    expected = run(model)
    for layer in model.encoder.layer:
        norm = layer.output.LayerNorm
        for name in ("weight", "bias"):
            norm.__dict__[name] = norm._parameters.pop(name)
    with adapterhub.patched(model):
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert len(counted) == 4
