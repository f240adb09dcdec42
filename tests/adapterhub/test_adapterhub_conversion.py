"""AdapterHub's modules become `BottleneckAdapter`s over the same parameters."""

import pytest
import torch
from foreign_modules import SpeechBrainLinear, check
from torch import nn

from adapterkern.integrations import adapterhub


def test_modules_of_other_libraries_are_passed_on():
    module = SpeechBrainLinear()
    adapter = adapterhub.from_module(module)
    assert adapter.up_proj.weight is module.adapter_up_proj.weight
    with pytest.raises(TypeError, match="Linear is no adapter"):
        adapterhub.from_module(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "config",
    [
        "seq_bn",
        "double_seq_bn[non_linearity='gelu']",
        "scaled_par_bn",
        "seq_bn[scaling='channel']",
        "seq_bn[dropout=0.5]",
    ],
)
def test_adapterhub_modules_convert(config):
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    model = models.build("bert")
    model.add_adapter("a", config=config)
    models.randomise_adapters(model)
    module = model.get_submodule("encoder.layer.0.output").adapters["a"].eval()
    adapter = adapterhub.from_module(module)
    x, residual = torch.randn(2, 3, models.HIDDEN), torch.randn(2, 3, models.HIDDEN)
    parallel = type(module).__name__ == "ParallelAdapter"
    check(
        module,
        lambda: adapter(x, residual=None if parallel else residual),
        lambda: module(x, residual)[0],
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("compacter++[reduction_factor=4]", "Kronecker"),
        ("seq_bn[use_gating=True]", "gated"),
        ("seq_bn[ln_before=True]", "before the down"),
        ("seq_bn[ln_after=True]", "after the up"),
        ("seq_bn[non_linearity='mish']", "no fused form"),
    ],
)
def test_adapterhub_modules_of_other_maths_are_refused(config, why):
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    model = models.build("bert")
    model.add_adapter("a", config=config)
    module = model.get_submodule("encoder.layer.0.output").adapters["a"]
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=why):
        adapterhub.from_module(module)


def test_adapterhub_modules_with_stochastic_depth_are_refused_in_evaluation_too():
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    model = models.bert()
    module = model.get_submodule("encoder.layer.0.output").adapters["a"]
    module.DropPath = nn.Identity()  # torchvision's StochasticDepth, which has a p
    module.DropPath.p = 0.1
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=r"rows(.|\n)*DropPath\.p = 0"):
        adapterhub.from_module(module.eval())
    parallel = models.bert("par_bn").get_submodule("encoder.layer.0.output").adapters["a"]
    parallel.DropPath = module.DropPath  # which its forward does not call
    assert adapterhub.from_module(parallel).down_proj.weight is parallel.adapter_down[0].weight
    module.DropPath.p = 0.0
    assert adapterhub.from_module(module).down_proj.weight is module.adapter_down[0].weight


def test_adapterhub_modules_are_taken_as_they_are_called():
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    module = models.bert().get_submodule("encoder.layer.0.output").adapters["a"]
    module.DropPath = nn.Identity()
    module.DropPath.p = 0.0
    for part in (module, module.adapter_down, module.non_linearity, module.DropPath):
        handle = part.register_forward_hook(lambda *_: None)
        with pytest.raises(adapterhub.UnsupportedAdapterError, match="hooks"):
            adapterhub.from_module(module)
        handle.remove()
    module.adapter_down[1] = nn.Tanh()  # module.non_linearity is not called any more
    adapter = adapterhub.from_module(module)
    x = torch.randn(2, 3, models.HIDDEN)
    check(module, lambda: adapter(x), lambda: module(x, x)[0])
    module.adapter_down.append(nn.Dropout())
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="adapter_down is not"):
        adapterhub.from_module(module)
