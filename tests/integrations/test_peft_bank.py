"""adapter_names: one grouped call for the adapters of a batch; saved adapters in a bank."""

import logging

import peft
import pytest
import torch
from mixed_models import NAMES, assert_same, gradients, layers_of, randomised
from torch import nn

import adapterkern as ak
from adapterkern.integrations.peft import (
    BottleneckConfig,
    adapters_in,
    grouped,
)
from adapterkern.integrations.peft.mixed_batch import adapter_names_in_forward


def test_one_call_serves_a_layer_and_one_routing_all_layers(mixed, batch, output, ran):
    model = mixed("bert")
    output(model, batch("bert"), adapter_names=NAMES)
    assert len(ran) == len(layers_of(model)) == 4
    assert len({id(call.order) for call in ran}) == 1
    assert [call.ranks.tolist() for call in ran] == [[2, 5]] * 4
    assert ran[0].token_slots.tolist() == [0] * 7 + [-1] * 7 + [1] * 7 + [0] * 7
    assert ran[0].add_input  # and no copy of the batch beside it
    ran.clear()
    output(model, batch("bert"), adapter_names=["french"] * 4)  # a plain call, of no copied weights
    output(model, batch("bert"), adapter_names=["__base__"] * 4)
    assert not ran


def test_adapters_of_two_activations_and_placements_are_a_call_each(tiny, batch, output, ran):
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(placement="pfeiffer"), "first")
    for name, fields in {
        "relu": {"activation": "relu"},
        "beside": {"placement": "parallel"},
        "other": {"bias": False, "scaling": 0.5},  # goes with the first
    }.items():
        model.add_adapter(name, BottleneckConfig(**{"placement": "pfeiffer", **fields}))
    randomised(model).eval()
    names = ["first", "relu", "beside", "other"]
    result = output(model, batch("bert"), adapter_names=names)
    assert [call.activation for call in ran] == ["gelu", "relu", "gelu"] * 2
    assert [call.slots for call in ran] == [2, 1, 1] * 2
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert_same(result[row], output(model, batch("bert"))[row])


APART = {
    "channel": ({"scaling": "channel"}, "it has a scaling for each channel"),
    "dropout": ({"dropout": 0.5}, "it has a dropout of 0.5 in training"),
    "hooks": ({}, "down_proj has hooks and must be called to be itself"),
    "own-hooks": ({}, "it has hooks and must be called to be itself"),
    "wrapped": ({}, "up_proj is a Wrapped, which must be called to be itself"),
}


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("kind", APART)
def test_an_adapter_that_no_group_can_serve_runs_apart_and_says_why(
    mixed, batch, ran, looped, caplog, kind
):
    fields, why = APART[kind]
    model = mixed("bert")
    model.add_adapter("odd", BottleneckConfig(**fields))
    randomised(model)
    calls = []
    for layer in layers_of(model):
        adapter = layer.bottleneck_adapter["odd"]
        if kind == "hooks":
            adapter.down_proj.register_forward_hook(lambda m, args, y: calls.append(y))
        elif kind == "own-hooks":
            adapter.register_forward_hook(lambda m, args, y: calls.append(y))
        elif kind == "wrapped":
            adapter.up_proj = Wrapped(adapter.up_proj)
    names = ["french", "odd", "legal", "__base__"]
    model.train()

    def run():
        torch.manual_seed(5)
        return gradients(model, batch("bert"), names)

    with caplog.at_level(logging.WARNING, "adapterkern"):
        found = run()
    lines = [line for line in caplog.messages if "runs apart" in line]
    assert lines == [f"adapter 'odd' runs apart from the others of its batch ({why})"]
    assert [call.slots for call in ran] == [2] * 4  # the others share a call as before
    assert len(calls) == (4 if "hooks" in kind else 0)
    if kind != "dropout":  # whose draws depend on the order
        assert_same(found, looped(run))
        for row, name in enumerate(names[:3]):
            model.set_adapter(name)
            with torch.no_grad():
                assert_same(found[0][row], model(**batch("bert"))[0][row])
    table = ak.explain(model, **batch("bert"), adapter_names=names)
    assert table.apart == (f"adapter 'odd' runs apart from the others of its batch: {why}",)
    assert str(table).endswith(table.apart[0])


def test_a_named_backend_without_the_op_runs_the_loop(mixed, batch, output, spy, ran):
    """The backend of this name takes single adapters alone, and a call that names it is kept."""
    model = mixed("bert")
    expected = output(model, batch("bert"), adapter_names=NAMES)
    spy.operations = frozenset({"bottleneck_adapter"})
    with ak.use_backend("triton"):
        result = output(model, batch("bert"), adapter_names=NAMES)
        table = ak.explain(model, **batch("bert"), adapter_names=NAMES)
    assert_same(result, expected)
    assert len(spy.forwards) == 2 * 2 * 4
    assert "operation grouped_bottleneck_adapter is not implemented" in table.apart[0]


def test_transforms_of_torch_func_run_the_loop(mixed):
    layer = layers_of(mixed("bert"))[0]
    x = torch.randn(4, 3, layer.base_layer.in_features)

    def run(x):
        return layer(x, adapter_names=NAMES).square().sum()

    expected = torch.autograd.functional.jacobian(run, x)
    assert_same(torch.func.grad(run)(x), expected)


def test_a_compiled_layer_takes_other_names(mixed, ran, recompiled):
    """A graph holds the names, with the loop that they make."""
    layer = layers_of(mixed("bert"))[0]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(4, 3, layer.base_layer.in_features)
    for names in (NAMES, NAMES[::-1]):
        ran.clear()
        found = compiled(x, adapter_names=names)
        assert not ran
        assert_same(found, layer(x, adapter_names=names))


def test_explain_shows_the_call_of_a_layer_and_who_was_not_named(mixed, batch, clean_dispatch):
    table = ak.explain(mixed("bert"), **batch("bert"), adapter_names=NAMES)
    layer = "base_model.model.encoder.layer.0.output.dense.bottleneck_adapter"
    rows = [row for row in table.rows if row.adapter.startswith(layer)]
    found = [(r.adapter.removeprefix(layer), r.calls, r.bottleneck_size, r.backend) for r in rows]
    assert found == [("", 1, 5, "reference"), (".unused", 0, 5, "not called")]
    assert "slots=2 H=32 R=5 gelu float32 on cpu" in rows[0].explanation.call
    assert table.apart == ()
    assert len(table.rows) == 8


def in_place(adapter):
    adapter.up_proj.weight.neg_()


def in_new_memory(adapter):
    adapter.up_proj.weight.data = -adapter.up_proj.weight.data


def by_another(adapter):
    adapter.up_proj.weight = nn.Parameter(-adapter.up_proj.weight)


def by_an_option(adapter):
    adapter.activation = "relu"


def test_weights_that_change_within_generate_are_seen_and_others_are_stacked_once(
    mixed, batch, ran
):
    model, ids = mixed("gpt2"), batch("gpt2")["input_ids"]
    adapter = layers_of(model)[0].bottleneck_adapter["french"]

    def first_calls(change):
        """Of the first layer, before the change and after it."""
        ran.clear()
        steps = [0]

        def processor(ids, scores):
            steps.append(len(ran))
            if len(steps) == 3:
                change(adapter)
            return scores

        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                min_new_tokens=4, do_sample=False, adapter_names=NAMES,
                logits_processor=[processor],
            )  # fmt: skip
        return [ran[step] for step in steps[:2]], [ran[step] for step in steps[2:4]]

    def stacked_once(*calls):
        return len({id(call.up_weights) for call in calls}) == 1

    before, after = first_calls(lambda adapter: None)
    assert stacked_once(*before, *after)
    for change in (in_place, in_new_memory, by_another):
        before, after = first_calls(change)
        assert stacked_once(*before)
        assert stacked_once(*after)
        assert torch.equal(after[0].up_weights[0, :, :2], -before[0].up_weights[0, :, :2])
    before, after = first_calls(by_an_option)
    assert [call.activation for call in before + after] == ["gelu"] * 2 + ["relu"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_layer_stays(mixed, dtype):
    """Adapters of a half-precision model stay float32, and so does their learned scaling."""
    layer = layers_of(mixed("bert", scaling="learned"))[0]
    layer.base_layer.to(dtype)
    if dtype == torch.float64:
        layer.to(dtype)
    x = torch.randn(4, 3, layer.base_layer.in_features, dtype=dtype)
    result = layer(x, adapter_names=NAMES)
    assert result.dtype == dtype
    for row, name in enumerate(NAMES):
        y = layer.base_layer(x[row])
        due = y if name == "__base__" else layer._adapt(y, None, name)
        torch.testing.assert_close(result[row], due)


def test_autocast_and_inference_mode(mixed, batch, looped):
    model = mixed("bert")

    def run():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return model(**batch("bert"), adapter_names=NAMES)[0].clone()

    torch.testing.assert_close(run(), looped(run), atol=2e-2, rtol=2e-2)


def test_weights_of_an_inference_mode_are_read_anew(mixed):
    """They count no versions, so nothing tells whether they have changed."""
    layer = layers_of(mixed("bert"))[0]
    adapter = layer.bottleneck_adapter["french"]
    with torch.inference_mode():
        adapter.up_proj.weight = nn.Parameter(adapter.up_proj.weight.clone())
        assert adapter.up_proj.weight.is_inference()
        names, x = grouped.NamedBatch(NAMES), torch.randn(4, 3, layer.base_layer.in_features)
        before = layer(x, adapter_names=names)
        adapter.up_proj.weight.neg_()
        after = layer(x, adapter_names=names)
        assert torch.equal(after, layer(x, adapter_names=NAMES))
        assert not torch.equal(after, before)


def test_names_of_an_open_context_are_repeated_with_the_inputs(mixed, batch, ran):
    """The beams of generate change the list that layers have seen."""
    model = mixed("gpt2")
    ids = batch("gpt2")["input_ids"]
    inner = model.get_base_model()
    with torch.no_grad(), adapter_names_in_forward(inner, NAMES):
        inner(ids)
        inner._expand_inputs_for_generation(expand_size=2, input_ids=ids)
        inner(ids.repeat_interleave(2, 0))
    assert ran[-1].token_slots.view(8, 7)[:, 0].tolist() == [0, 0, -1, -1, 1, 1, 0, 0]


def test_saved_adapters_serve_in_a_bank(mixed, tmp_path):
    """Of every place its own, with its activation and scaling, of a float and of a learned one."""
    model = mixed("bert", activation="relu", scaling=0.5)
    model.add_adapter("learned", BottleneckConfig(activation="relu", scaling="learned"))
    randomised(model).save_pretrained(tmp_path)
    place = "encoder.layer.1.output.dense"
    saved = {name: adapters_in(tmp_path / name) for name in ("french", "learned")}
    assert [len(adapters) for adapters in saved.values()] == [4, 4]
    bank = ak.AdapterBank(32, 8, 4, activation="relu")
    for name, adapters in saved.items():
        bank.add(name, adapters[place])
    routing = ak.AdapterRouting(3, 4).update(bank.ids(["learned", None, "french"]))
    layer = model.get_base_model().get_submodule(place)
    x = torch.randn(3, layer.base_layer.in_features)
    due = layer(x, adapter_names=["learned", "__base__", "french"])
    assert_same(bank(layer.base_layer(x), routing), due)


def test_saved_folders_serve_the_base_model_in_banks(mixed, tiny, batch, output, tmp_path):
    """What a mixed batch of PEFT's model computes, the base model computes without it."""
    model = mixed("gpt2", activation="relu", scaling=0.5)
    model.save_pretrained(tmp_path)
    base = tiny("gpt2")
    saved = {name: adapters_in(tmp_path / name) for name in ("french", "legal")}
    banks = ak.insert_banks(base, after=list(saved["french"]), activation="relu", slots=2)
    for name, adapters in saved.items():
        banks.add(name, adapters)
    banks.route([None if name == "__base__" else name for name in NAMES])
    due = output(model, batch("gpt2"), adapter_names=NAMES)
    assert_same(output(base, batch("gpt2")), due)


def test_saved_adapters_keep_their_dtypes_and_leave_saved_modules_out(tiny, tmp_path):
    model = peft.get_peft_model(tiny("bert-classifier"), BottleneckConfig(task_type="SEQ_CLS"))
    model.half().save_pretrained(tmp_path)
    adapters = adapters_in(tmp_path)
    assert set(adapters) == {
        f"bert.encoder.layer.{layer}.{place}output.dense"
        for layer in (0, 1)
        for place in ("", "attention.")
    }
    assert {p.dtype for one in adapters.values() for p in one.parameters()} == {torch.float16}


def test_a_folder_without_such_adapters_is_an_error(tiny, tmp_path):
    peft.get_peft_model(tiny("bert"), BottleneckConfig()).save_pretrained(tmp_path / "own")
    with pytest.raises(KeyError, match=r"no adapter of 'dense'; it has encoder.layer.0.attention"):
        adapters_in(tmp_path / "own")["dense"]
    lora = peft.LoraConfig(target_modules=["query"])
    peft.get_peft_model(tiny("bert"), lora).save_pretrained(tmp_path / "lora")
    for folder, message in {
        "lora": "saved bottleneck adapter, got one of LORA.\n  hint: save_pretrained",
        "none": "no such folder.\n  hint: save_pretrained",
        ".": "no adapter_config.json in it",
    }.items():
        with pytest.raises(ValueError, match=message):
            adapters_in(tmp_path / folder)
    BottleneckConfig().save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match="got a configuration without weights"):
        adapters_in(tmp_path / "config")
