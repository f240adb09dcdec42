"""Times an active AdapterHub layer on the host, stock and patched, for one token of 32 features.

`bare` runs the same PyTorch operations with no module, check or choice around them; `free kernel`
is the patched layer over a backend that has its results ready, which leaves what a GPU waits for,
and `free norm` the same with a post-LN model's last LayerNorm among them.
The tables of docs/adapterhub.md are the medians, in ranges over the presets. It asserts no time:

    pytest benchmarks/test_adapterhub_host_time.py --benchmark-columns=median
"""

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)

import adapters
import transformers
from adapters.methods.bottleneck import BottleneckLayer

import adapterkern as ak
from adapterkern.backends import get
from adapterkern.integrations import adapterhub
from adapterkern.results import Outputs, Saved

HIDDEN = 32
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "recorded": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
MODELS = {
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=40, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=16)
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ),
}


def bare_operations(adapter, h, inp, norm) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the fewest PyTorch operations that a layer needs, by preset."""
    scaling = adapter.scaling
    down, up = ((m.weight, m.bias) for m in (adapter.adapter_down[0], adapter.adapter_up))
    norm_options = norm and (norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def normalised(x):
        return torch.layer_norm(x, *norm_options) if norm else x

    def up_projection(x, activate=torch.relu_):
        return F.linear(activate(F.linear(x, *down)), *up)

    def seq_bn():
        t = h + inp
        return normalised(up_projection(normalised(t)).add_(t))

    def double_seq_bn():
        return normalised(up_projection(h, partial(F.silu, inplace=True)).add_(h).add_(inp))

    def par_bn():
        return normalised(torch.add(inp, up_projection(inp), alpha=scaling).add_(h))

    def scaled_par_bn():
        return normalised((up_projection(inp) * scaling).add_(inp).add_(h))

    return {f.__name__: f for f in (seq_bn, double_seq_bn, par_bn, scaled_par_bn)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", ["stock", "patched", "bare", "free kernel", "free norm"])
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_layer(benchmark, monkeypatch, mode, name, preset, way):
    benchmark.group = f"{mode} {name} {way}"
    model = MODELS[name]()
    adapters.init(model)
    model.add_adapter("a", config=preset)
    model.train_adapter("a")
    model.eval()
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer) and m.adapters)
    norm = nn.LayerNorm(HIDDEN).requires_grad_(False) if name == "bert" else None
    h, inp = torch.randn(2, 1, 1, HIDDEN)
    bare = bare_operations(layer.adapters["a"], h, inp, norm)[preset]

    def call():
        return layer.bottleneck_layer_forward(h, inp, norm)

    with MODES[mode](), contextlib.ExitStack() as stack:
        expected = call()
        if way not in ("stock", "bare"):
            stack.enter_context(adapterhub.patched(model))
        if way.startswith("free"):
            y, normed = torch.empty(2, *h.shape)
            results = Outputs(y), Saved(torch.empty(1, 2))
            if way == "free norm" and norm:
                stack.enter_context(ak.use_backend("reference"))
                results = Outputs(y, normed), Saved(torch.empty(1, 2), *torch.empty(2, 1))
            monkeypatch.setattr(get("reference"), "forward", lambda call, save: results)
        y = benchmark(bare if way == "bare" else call)
    if not way.startswith("free"):
        tolerance = 0.02 if mode == "autocast" else 1e-5
        torch.testing.assert_close(
            y, expected, rtol=tolerance, atol=tolerance, check_dtype=way != "bare"
        )
