"""Each condition of the patch decides something: what a call or a report would be without it."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
from adapterhub_models import UNFIT, bert, run
from adapters.methods.bottleneck import BottleneckState

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path
from adapterkern.integrations.adapterhub.patching import is_installed


class Tagged(torch.Tensor):
    """A class of its own, with the values of a plain tensor."""


def test_a_layer_with_a_compose_single_of_its_own_keeps_it(counted):
    model = bert()
    layer = model.get_submodule("encoder.layer.1.output")

    class Halved(type(layer)):
        def compose_single(self, adapter_setup, state, lvl=0):
            state = super().compose_single(adapter_setup, state, lvl)
            return state._replace(hidden_states=state.hidden_states / 2)

    before = run(model)
    layer.__class__ = Halved
    expected = run(model)
    assert not torch.allclose(expected, before, atol=1e-2)
    with adapterhub.patched(model):
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert len(counted) == 2


@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
def test_a_strictness_of_an_earlier_patch_does_not_come_alive_again():
    model = bert()
    adapterhub.patch(model, strict=True)
    adapterhub.patch()  # of every model, and not strict
    model.add_adapter("later", config=UNFIT)
    model.set_active_adapters("later")
    expected = run(model)
    adapterhub.unpatch()
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)


def test_copies_alone_keep_the_patch_through_blocks_of_other_models(counted):
    model, other = bert(), bert()
    adapterhub.patch(model)
    twin = copy.deepcopy(model)
    adapterhub.unpatch(model)
    with adapterhub.patched(other):
        pass
    run(twin)
    assert len(counted) == 2


def test_a_block_of_the_only_patched_model_ends_with_its_copies():
    model = bert()
    with adapterhub.patched(model):
        twin = copy.deepcopy(model)
        assert adapterhub.explain(twin).patched
    assert not is_installed()


X = torch.zeros(2, 3, models.HIDDEN)


@pytest.mark.parametrize(
    ("x", "residual", "reason"),
    [
        (X, X, None),
        (X.as_subclass(Tagged), X, "export"),
        (X, X.as_subclass(Tagged), "export"),
        (X, None, "export"),
        (X, X[:1], "shape"),
        (X[:, :1], X, "shape"),
    ],
    ids=["same", "tagged", "tagged-residual", "no-residual", "narrow-residual", "narrow"],
)
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_one_adapter_s_call_is_fused_only_as_it_was_made_for(
    counted, recompiled, x, residual, reason, strict
):
    """`compose_single` as compositions call it. What is exported says nothing, strict or not."""
    model = bert()
    layer = model.get_submodule("encoder.layer.0.output")
    state = BottleneckState(x, residual, residual, None)

    def outcome():
        try:
            return layer.compose_single("a", state).hidden_states
        except TypeError as error:
            return str(error)

    expected = outcome()
    with warnings.catch_warnings(record=True) as caught, adapterhub.patched(model, strict=strict):
        warnings.simplefilter("always", adapterhub.FallbackWarning)
        if strict and reason == "shape":
            with pytest.raises(adapterhub.UnsupportedAdapterError, match="reason: shape"):
                outcome()
            return
        found = outcome()
    if isinstance(expected, str):
        assert found == expected
    else:
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    told = [str(warning.message) for warning in caught]
    assert len(told) == (reason == "shape"), told
    assert all("reason: shape" in message for message in told)
    assert len(counted) == (reason is None)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_at_the_level_of_adapters_is_the_library_s_and_says_nothing(counted):
    model = bert()
    layer = model.get_submodule("encoder.layer.1.output")
    given = torch.randn(1, 2, models.HIDDEN), torch.randn(1, 2, models.HIDDEN)
    with warnings.catch_warnings(), adapterhub.patched(model, strict=True, layer_level=False):
        warnings.simplefilter("error", adapterhub.FallbackWarning)
        torch.jit.trace(layer, given, check_trace=False)
        assert not counted
        layer(*given)
    assert len(counted) == 1


def reasons_of(model):
    return [row.reason for row in adapterhub.explain(model).rows]


def test_the_dtype_of_a_block_is_that_of_its_matrices_if_they_have_one():
    model = bert()
    block = model.encoder.layer[0]
    block.to(torch.bfloat16).output.adapters.float()
    assert reasons_of(model) == ["dtype", ""]
    block.output.dense.extra = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    assert reasons_of(model) == ["", ""]  # of two dtypes nobody can tell
    block.output.dense.extra = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    assert reasons_of(model) == ["dtype", ""]  # a vector, as those of a norm
    integers = torch.zeros(2, 2, dtype=torch.int8)
    block.output.dense.extra = nn.Parameter(integers, requires_grad=False)
    assert reasons_of(model) == ["dtype", ""]
    block.output.dense.lora_A = nn.Parameter(torch.zeros(2, 2))
    assert reasons_of(model) == ["dtype", ""]  # what the library adds is no part of the base


def test_a_block_without_matrices_takes_the_dtype_of_what_is_around_it():
    class Bare(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

    model = bert(name="gpt2").to(torch.bfloat16)
    model.adapter_to("a", dtype=torch.float32)
    layer = model.h[0].output_adapters
    model.h[0].output_adapters = Bare(layer)  # as where a wrapper stands around it
    assert reasons_of(model) == ["dtype", "dtype"]
    assert adapterhub.explain(Bare(layer)).rows[0].reason == ""  # nothing is around it
    assert fast_path.level_of(layer.adapters_config) == fast_path.OFF
