"""What tests of a batch with an adapter for each input share."""

import torch
from torch import nn

import adapterkern as ak
from adapterkern.integrations.peft import BottleneckLinear

NAMES = ["french", "__base__", "legal", "french"]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, BottleneckLinear)]


def randomised(model):
    """Adapters that do something, each something else, without dropout anywhere."""
    torch.manual_seed(4)
    for key, parameter in model.named_parameters():
        if ".bottleneck_adapter." in key:
            nn.init.normal_(parameter, std=1.0 if key.endswith("scaling") else 0.3)
    for module in model.modules():
        if not isinstance(module, ak.BottleneckAdapter):
            for name, value in vars(module).items():
                if isinstance(value, float) and (name == "p" or "dropout" in name):
                    setattr(module, name, 0.0)
    return model


def weights(result):
    """Of a sum that is a loss: a norm at the end of a model makes its squares a constant."""
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(6))


def gradients(model, inputs, names):
    """The result of a forward, and gradients of the input and by parameter."""
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    model.zero_grad()
    result = model(inputs_embeds=embedded, **rest, adapter_names=names)[0]
    (result * weights(result)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result.detach(), embedded.grad, found


def assert_same(found, expected):
    """Within roundings of float32, by the root of the mean square of each tensor."""
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = found.values(), [expected[key] for key in found]
    if not isinstance(found, torch.Tensor):
        for one, due in zip(found, expected, strict=True):
            assert_same(one, due)
        return
    error, size = (found - expected).norm(), expected.norm()
    assert size > 0
    assert error <= 2e-6 * (size + 1), (error, size)
