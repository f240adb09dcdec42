"""Counts what an active layer asks of the host, stock and patched;
benchmarks/test_adapterhub_host_time.py times it."""

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
from adapters.methods.bottleneck import BottleneckLayer
from host_work import Operations, free_kernel, work_of

import adapterkern as ak
from adapterkern.integrations import adapterhub

MODELS = ("gpt2", "bert")
PRESETS = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn")


@pytest.fixture
def layer_of():
    """(model, preset) -> the model, and a call of its layer with an adapter that is trained."""

    def build(name: str, preset: str):
        model = models.build(name)
        model.add_adapter("a", config=preset)
        model.train_adapter("a")
        model.eval()
        layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer) and m.adapters)
        norm = nn.LayerNorm(models.HIDDEN).requires_grad_(False) if name == "bert" else None
        h, inp = torch.randn(2, 1, 1, models.HIDDEN)
        return model, lambda: layer.bottleneck_layer_forward(h, inp, norm)

    return build


# A patched call's Python frames, as a share of stock's, and the calls that this package makes. A
# post-LN model's last LayerNorm is PyTorch's under "auto", and in the same pass where it is named.
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("name", "wanted", "records", "share", "most"),
    [
        ("gpt2", "auto", False, 0.62, 72),
        ("gpt2", "auto", True, 0.75, 84),
        ("bert", "auto", False, 0.72, 84),
        ("bert", "auto", True, 0.84, 96),
        ("bert", "reference", False, 0.75, 88),
        ("bert", "reference", True, 0.92, 105),
    ],
)
def test_a_patched_layer_calls_no_module_and_little_else(
    layer_of, name, preset, wanted, records, share, most
):
    model, call = layer_of(name, preset)
    results = torch.empty(1, 1, models.HIDDEN), torch.empty(1, 2)
    with torch.set_grad_enabled(records):
        stock = work_of(call)
        with adapterhub.patched(model), free_kernel(*results), ak.use_backend(wanted):
            assert call().requires_grad == records
            patched = work_of(call)
    assert stock.modules >= 7
    assert patched.modules == 0
    assert patched.frames <= share * stock.frames
    assert patched.own_calls.total() <= most, patched.own_calls


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_a_patched_layer_is_one_operation_beside_the_block_s_own(layer_of, name, preset):
    """Post-LN models have the LayerNorm too, which no kernel takes here; where it or the adapter
    reads h + inp, also their sum.
    """
    model, call = layer_of(name, preset)
    with Operations() as stock:
        call()
    with adapterhub.patched(model), Operations() as patched:
        call()
    norm = ["aten.native_layer_norm"] * (name == "bert")
    before = ["aten.add", *norm] if preset == "seq_bn" else []
    assert patched.names == [*before, "adapterkern.forward", *norm]
    assert len(stock.names) - len(patched.names) >= 6
