import logging
import re
from collections import Counter

import peft
import pytest
import torch
import transformers
from families import FAMILIES, build, inputs_of

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear, targets

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
SIZE = {"bottleneck_size": 4, "init": "bert"}


def adapted(model):
    """Adapted layers by name, seen from the base model."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, BottleneckLinear)}


def tensors(output):
    return [value for value in output.values() if torch.is_tensor(value)]


def check_places(model, expected, times):
    found = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in adapted(model))
    if TRANSFORMERS_5:  # it renamed modules of some; there are as many
        assert found.total() == times * len(expected)
    else:
        assert found == dict.fromkeys(expected, times)


# Encoders and decoders of text, both together, pictures, sound, experts, fused projections.
KINDS = {"bart", "bert", "bloom", "clip", "gpt2", "llama", "mixtral", "t5", "vit", "wav2vec2"}
each_family = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.thorough] * (n not in KINDS)) for n in FAMILIES],
)


@each_family
def test_family_is_adapted_where_it_belongs_trains_saves_and_reloads(name, tmp_path):
    family, inputs = FAMILIES[name], inputs_of(name)
    model = peft.get_peft_model(build(name), BottleneckConfig(**SIZE)).eval()
    check_places(model, [*family.attention.split(), *family.feed_forward.split()], family.times)

    calls = Counter()
    for place, layer in adapted(model).items():
        layer.bottleneck_adapter["default"].register_forward_hook(
            lambda *_, place=place: calls.update([place])
        )
    output = model(**inputs)
    once = 2 // family.times  # ALBERT's one layer is run as often as others have layers
    assert calls == dict.fromkeys(adapted(model), once)
    loss = sum(
        (value * torch.linspace(0.3, 1.7, value.numel()).view_as(value)).sum()
        for value in tensors(output)
        if value.requires_grad
    )
    loss.backward()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(weights) == 4 * len(adapted(model))
    assert all(weight.grad.abs().max() > 0 for weight in weights)

    with torch.no_grad():
        for weight in weights:
            weight -= 0.1 * weight.grad / weight.grad.abs().max()
        trained = tensors(model(**inputs))
    assert any(not torch.equal(*pair) for pair in zip(trained, tensors(output), strict=True))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path)
    with torch.no_grad():
        again = tensors(loaded(**inputs))
    assert all(torch.equal(*pair) for pair in zip(again, trained, strict=True))


@each_family
def test_placements_at_the_ffn_leave_attention_alone(name):
    family = FAMILIES[name]
    after, beside = (BottleneckConfig(placement=one, **SIZE) for one in ("pfeiffer", "parallel"))
    if family.experts:
        refused = [beside] if family.feed_forward else [after, beside]
        for config in refused:  # experts shared by all tokens are dense, but no whole FFN
            with pytest.raises(ValueError, match="its FFNs are mixtures of experts"):
                peft.get_peft_model(build(name), config)
        if family.feed_forward:
            model = peft.get_peft_model(build(name), after)
            check_places(model, family.feed_forward.split(), family.times)
        return
    model = peft.get_peft_model(build(name), after)
    model.add_adapter("beside", beside)
    check_places(model, family.feed_forward.split(), family.times)
    for layer in adapted(model).values():
        assert set(layer.bottleneck_adapter) == {"default", "beside"}
        assert layer.parallel == {"beside"}


def test_tested_families_are_those_of_the_tests():
    assert set(FAMILIES) == targets.TESTED


def test_experts_are_left_out_and_the_log_says_so(caplog):
    targets.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="adapterkern"):
        peft.get_peft_model(build("bert"), BottleneckConfig())
        assert not caplog.records
        for _ in range(2):
            peft.get_peft_model(build("mixtral"), BottleneckConfig())
    (record,) = caplog.records
    assert record.getMessage() == (
        "adapterkern: the experts of this 'mixtral' model get no adapters (model.layers.*); "
        "its dense layers do: self_attn.o_proj."
    )
