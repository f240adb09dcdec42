import peft
import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear

SPECIAL = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
NAMES = ["french", "__base__", "legal", "french"]


@pytest.fixture
def mixed(tiny):
    """mixed(name, **fields): a model with the adapters "french" and "legal"."""

    def build(name, **fields):
        model = peft.get_peft_model(tiny(name), BottleneckConfig(**fields), "french")
        model.add_adapter("legal", BottleneckConfig(bottleneck_size=5, **fields))
        for key, parameter in model.named_parameters():
            if "up_proj.weight" in key:
                nn.init.normal_(parameter)
        return model.eval()

    return build


def one_by_one(model, run, names):
    """run(model) with each adapter for the whole batch; then the rows that the names ask for."""
    results = {}
    for name in dict.fromkeys(names):
        if name == "__base__":
            with model.disable_adapter():
                results[name] = run(model)
        else:
            model.set_adapter(name)
            results[name] = run(model)
    return [results[name][row] for row, name in enumerate(names)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "llama", "t5", "vit"])
def test_mixed_batch_gives_each_input_its_adapter(mixed, batch, output, name):
    """OPT flattens its tokens before the feed-forward block, so rows are no inputs there."""
    model = mixed(name)
    inputs = batch(name)
    result = output(model, inputs, adapter_names=NAMES)
    rows = one_by_one(model, lambda model: output(model, inputs), NAMES)
    for row, expected in enumerate(rows):
        torch.testing.assert_close(result[row], expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(result[0], result[1], atol=1e-2)
    for layer in (module for module in model.modules() if isinstance(module, BottleneckLinear)):
        assert not layer._forward_pre_hooks  # nothing is left behind


def test_mixed_batch_serves_adapters_of_different_layers(tiny, batch, output):
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(init="bert"), "french")
    model.add_adapter("legal", BottleneckConfig(target_modules=["intermediate.dense"], init="bert"))
    model.eval()
    result = output(model, batch("bert"), adapter_names=NAMES)
    rows = one_by_one(model, lambda model: output(model, batch("bert")), NAMES)
    torch.testing.assert_close(result, torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_mixed_batch_switches_saved_modules_too(tiny, batch, output):
    config = BottleneckConfig(task_type="SEQ_CLS", init="bert")
    model = peft.get_peft_model(tiny("bert-classifier"), config, "french")
    model.add_adapter("legal", BottleneckConfig(task_type="SEQ_CLS", init="bert"))
    for key, parameter in model.named_parameters():
        if "classifier.modules_to_save.legal" in key:
            nn.init.normal_(parameter)
    model.eval()
    names = ["french", "legal", "legal", "french"]
    result = output(model, batch("bert"), adapter_names=names)
    rows = one_by_one(model, lambda model: output(model, batch("bert")), names)
    torch.testing.assert_close(result, torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result[0], result[1], atol=1e-2)


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned-beams": {"num_beams": 2, "num_return_sequences": 2},
    "returned-sequences": {"num_return_sequences": 3, "do_sample": True},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
}
# Where the options stand (arguments, a configuration that is passed, that of the model), and if
# PEFT wraps the model for a task: every way for the arguments, a part for the rest.
CASES = [
    *(
        (name, options, "arguments", None)
        for name in ("gpt2", "llama", "t5")
        for options in GENERATE
    ),
    *((name, "beams", "arguments", "task") for name in ("gpt2", "llama", "t5")),
    *(
        (name, options, place, task_type)
        for name in ("gpt2", "t5")
        for options in ("beams", "returned-sequences")
        for place, task_type in (("passed", None), ("model", "task"))
    ),
]


@pytest.mark.sweep("name", "options", "place", "task_type")
@pytest.mark.parametrize(("name", "options", "place", "task_type"), CASES)
def test_mixed_batch_generates_as_each_adapter_does(mixed, batch, name, options, place, task_type):
    if task_type:
        task_type = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    model = mixed(name, task_type=task_type)
    ids = batch(name)["input_ids"]
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        **GENERATE[options],
    }
    many = options.get("num_return_sequences", 1)
    if place == "passed":
        options = {"generation_config": GenerationConfig(**{**SPECIAL, **options})}
    elif place == "model":
        model.generation_config.update(**options)
        options = {}

    def run(model, **names):
        torch.manual_seed(3)  # the same draws whichever adapter runs
        with torch.no_grad():
            tokens = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **options, **names
            )
        return tokens.view(len(ids), many, -1)

    result = run(model, adapter_names=NAMES)
    rows = one_by_one(model, run, NAMES)
    assert all(torch.equal(result[row], expected) for row, expected in enumerate(rows))
    model.set_adapter("french")
    assert not torch.equal(run(model)[1:3], result[1:3])  # the names made the difference


@pytest.mark.parametrize("name", ["bert", "opt"])
@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("names", [NAMES[:2], NAMES * 2, NAMES[:3], []], ids=len)
def test_wrong_number_of_names_is_an_error(mixed, batch, output, name, names, task_type):
    model = mixed(name, task_type=task_type)
    message = f"one adapter for each input, got {len(names)} names for 4 inputs"
    with pytest.raises(ValueError, match=message):
        output(model, batch(name), adapter_names=names)
    for module in model.modules():
        assert not module._forward_pre_hooks  # removed in spite of the error


def test_number_of_names_is_checked_where_the_batch_is_unknown(mixed):
    layer = mixed("bert").get_base_model().encoder.layer[0].output.dense
    with pytest.raises(ValueError, match=r"3 names for hidden states of shape \[4, 7, 32\]"):
        layer(torch.randn(4, 7, 64), adapter_names=NAMES[:3])


def test_mixed_batch_leaves_the_output_of_the_base_layer_alone(mixed):
    layer = mixed("bert").get_base_model().encoder.layer[0].output.dense
    kept = []
    layer.base_layer.register_forward_hook(lambda module, inputs, y: kept.append(y))
    x = torch.randn(4, 7, 64)
    adapted = layer(x, adapter_names=NAMES)
    assert torch.equal(kept[0], nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(adapted, kept[0])


def test_assisted_generation_takes_the_name_of_its_one_input(mixed, tiny, batch):
    model = mixed("llama")
    ids = batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "assistant_model": tiny("llama")}
    model.set_adapter("legal")
    expected = model.generate(input_ids=ids, **options)
    model.set_adapter("french")
    assert torch.equal(model.generate(input_ids=ids, adapter_names=["legal"], **options), expected)
    assert not torch.equal(model.generate(input_ids=ids, **options), expected)


def test_inputs_repeated_by_the_model_itself_are_an_error_with_a_cure(mixed, batch):
    """As contrastive search does, which runs every candidate of an input at once."""
    model = mixed("gpt2")
    with pytest.raises(ValueError, match=r"4 names for 8 inputs.\n  hint: .*set_adapter"):
        model.generate(
            input_ids=batch("gpt2")["input_ids"].repeat_interleave(2, 0), adapter_names=NAMES
        )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["french", "english", "klingon", "legal"], "unknown adapters: english, klingon"),
        ("french", "must be a list, a name for each input, got 'french'"),
        (
            [["french", "legal"]] * 4,
            r"must be a list, a name for each input, got \[\['french'.*\n  hint: stacked adapters",
        ),
    ],
)
def test_unknown_names_are_an_error(mixed, batch, output, names, message):
    with pytest.raises(ValueError, match=message):
        output(mixed("bert"), batch("bert"), adapter_names=names)
