"""adapter_names: one grouped call for the adapters of a batch, in inference and in training."""

import copy
import logging

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import adapterkern as ak
from adapterkern.grouped import functional
from adapterkern.integrations.peft import (
    BottleneckConfig,
    BottleneckLinear,
    adapters_in,
    grouped,
)
from adapterkern.integrations.peft.mixed_batch import adapter_names_in_forward

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


@pytest.fixture
def mixed(tiny):
    """mixed(name, **fields): a model with "french", and the narrower "legal" and "unused"."""

    def build(name, **fields):
        model = peft.get_peft_model(tiny(name), BottleneckConfig(**fields), "french")
        for other in ("legal", "unused"):
            model.add_adapter(other, BottleneckConfig(bottleneck_size=5, **fields))
        model.set_requires_grad(["french", "legal", "unused"])
        return randomised(model).eval()

    return build


@pytest.fixture
def ran(monkeypatch):
    """The grouped calls that have run."""
    calls, run_call = [], functional.run_call

    def counted(call, *args):
        calls.append(call)
        return run_call(call, *args)

    monkeypatch.setattr(functional, "run_call", counted)
    return calls


@pytest.fixture
def looped(monkeypatch):
    """looped(function): its result where every adapter runs apart, on its own inputs."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "_reason_of", lambda adapter: "a test asks for it")
            return function()

    return run


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


FORMS = {
    "plain": {},
    "learned": {"scaling": "learned"},
    "scaled": {"scaling": 0.5, "activation": "silu"},
    "without-bias": {"bias": False},
    "parallel": {"placement": "parallel"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_training_a_mixed_batch_gives_the_gradients_of_the_loop(mixed, batch, looped, name, form):
    """OPT flattens its tokens."""
    model = mixed(name, **FORMS[form]).train()
    result = gradients(model, batch(name), NAMES)
    expected = looped(lambda: gradients(model, batch(name), NAMES))
    assert_same(result, expected)
    trained = {key.split(".bottleneck_adapter.")[1].split(".")[0] for key in result[2]}
    assert trained == {"french", "legal"}


def test_gradients_are_those_of_each_input_with_its_adapter_alone(mixed, batch):
    model = mixed("bert", scaling="learned").train()
    result, _, found = gradients(model, batch("bert"), NAMES)
    due: dict[str, torch.Tensor] = {}
    for row, name in enumerate(NAMES):
        if name == "__base__":
            continue
        model.set_adapter(name)
        one = {key: value[row : row + 1] for key, value in batch("bert").items()}
        model.zero_grad()
        alone = model(**one)[0]
        assert_same(result[row : row + 1], alone.detach())
        (alone * weights(result)[row]).sum().backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                due[key] = due.get(key, 0) + parameter.grad
    assert_same(found, due)


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


def test_nothing_is_left_behind(mixed, batch, ran):
    model = mixed("gpt2").train()
    model.gradient_checkpointing_enable()
    before = [dict(vars(module)) for module in model.modules()]
    gradients(model, batch("gpt2"), NAMES)
    for module, kept in zip(model.modules(), before, strict=True):
        assert vars(module) == kept
        assert not module._forward_pre_hooks or module is model.get_input_embeddings()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradient_checkpointing_keeps_the_names(mixed, batch, name, reentrant):
    model = mixed(name).train()
    model.set_adapter("unused")  # which a recompute without names would run
    model.set_requires_grad(["french", "legal", "unused"])
    expected = gradients(model, batch(name), NAMES)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, batch(name), NAMES), expected)


def test_checkpoints_of_torch_keep_the_names(mixed, batch):
    model = mixed("bert").train()
    expected = gradients(model, batch("bert"), NAMES)
    encoder = model.get_base_model().encoder
    encoder.layer[0].output = checkpoint_wrapper(encoder.layer[0].output)
    result, of_input, found = gradients(model, batch("bert"), NAMES)
    assert_same((result, of_input), expected[:2])
    inner = "_checkpoint_wrapped_module."
    assert_same({key.replace(inner, ""): value for key, value in found.items()}, expected[2])


def test_an_optimizer_moves_the_adapters_of_the_batch_alone(mixed, batch):
    """Weight decay and moments would move an adapter whose gradient is zero instead of None."""
    model = mixed("bert").train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    start = copy.deepcopy(model.state_dict())
    for names, moved in (
        (NAMES, {"french", "legal"}),
        (["legal"] * 2 + ["__base__"] * 2, {"legal"}),
    ):
        optimizer.zero_grad()
        model(**batch("bert"), adapter_names=names)[0][..., 0].sum().backward()
        optimizer.step()
        after = model.state_dict()
        for key, value in after.items():
            of_batch = any(f".bottleneck_adapter.{name}." in key for name in moved)
            assert torch.equal(value, start[key]) != of_batch, key
        start = copy.deepcopy(after)


def test_frozen_adapters_serve_and_stay(mixed, batch):
    model = mixed("bert").train()
    model.set_requires_grad("legal", requires_grad=False)
    _, _, found = gradients(model, batch("bert"), NAMES)
    assert found
    assert all(".french." in key for key in found)


def test_saved_modules_train_in_a_mixed_batch(tiny, batch):
    """PEFT's own wrapper picks the classifier of each input, and has a loop for it."""
    config = BottleneckConfig(task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny("bert-classifier"), config, "french")
    model.add_adapter("legal", BottleneckConfig(task_type="SEQ_CLS"))
    model.set_requires_grad(["french", "legal"])
    randomised(model).train()
    result = model(**batch("bert"), adapter_names=["french", "legal", "legal", "french"])[0]
    result[:1].sum().backward()
    heads = model.get_base_model().classifier.modules_to_save
    assert torch.equal(heads["french"].bias.grad, torch.ones(2))
    assert torch.equal(heads["legal"].bias.grad, torch.zeros(2))


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
