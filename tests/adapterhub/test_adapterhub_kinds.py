"""Parts of an adapter that are more than their class says, in a patched model: its values stay."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

from adapterhub_models import bert, run
from test_module_kinds import KINDS

from adapterkern.integrations import adapterhub

# Of the kinds of a BottleneckAdapter; here a projection is a plain nn.Linear or is called.
FUSED = {"as it is", "compiled in place", "plain tensors", "lazy"}


def adapter_of(model):
    return model.get_submodule("encoder.layer.0.output").adapters["a"]


def patched_and_stock(model, twin):
    expected = run(twin)
    with adapterhub.patched(model):
        return run(model), expected


@pytest.mark.sweep("name", "kind")
@pytest.mark.parametrize("name", ["adapter_down", "adapter_up"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("recompiled")
@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
def test_every_kind_of_projection_gives_what_the_library_gives(counted, kind, name):
    model = bert()
    adapter = adapter_of(model)
    holder, key = (adapter.adapter_down, "0") if name == "adapter_down" else (adapter, name)
    KINDS[kind][0](getattr(holder, key), holder, key)
    twin = copy.deepcopy(model) if "spectral" in kind else model
    found, expected = patched_and_stock(model, twin)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(counted) == 1 + (kind in FUSED)


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class HalfOf(nn.Module):
    def forward(self, u):
        return u / 2


class OwnActivation(nn.ReLU):
    def forward(self, z):
        return z.sin()


def double_the_sequence(adapter):
    adapter.adapter_down = Doubled(*adapter.adapter_down)


def lengthen_the_sequence(adapter):
    adapter.adapter_down.append(HalfOf())


def give_it_a_depth(adapter):
    adapter.DropPath = HalfOf().eval()  # in the place of torchvision's, which evaluation skips


def replace_the_activation(adapter):
    adapter.adapter_down[1] = OwnActivation()


def replace_the_function(adapter):
    adapter.adapter_down[1].f = OwnActivation()


def replace_the_dropout(adapter):
    adapter.dropout = HalfOf()


def make_scaling_a_buffer(adapter):
    del adapter.scaling
    adapter.register_buffer("scaling", torch.tensor([0.5]))


@pytest.mark.parametrize(
    "change",
    [
        double_the_sequence, lengthen_the_sequence, give_it_a_depth, replace_the_activation,
        replace_the_function, replace_the_dropout, make_scaling_a_buffer,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::adapterkern.FallbackWarning")
def test_parts_that_are_not_the_library_s_run_as_they_are(counted, change):
    model = bert()
    before = run(model)
    change(adapter_of(model))
    found, expected = patched_and_stock(model, model)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert len(counted) == 1
