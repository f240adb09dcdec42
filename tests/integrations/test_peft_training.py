import logging

import peft
import pytest
import torch
from torch import nn

import adapterkern
from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear


def layers(model):
    return [module for module in model.modules() if isinstance(module, BottleneckLinear)]


def train(model, inputs, labels, steps=5, lr=1e-2):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, eps=1e-4
    )
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_training_moves_adapters_and_head_and_nothing_else(tiny, batch):
    config = BottleneckConfig(task_type="SEQ_CLS", scaling="learned")
    model = peft.get_peft_model(tiny("bert-classifier"), config).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = train(model, batch("bert"), torch.tensor([0, 1, 1, 0]), steps=60)
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    own = {
        name
        for name in before
        if "bottleneck_adapter" in name or "classifier.modules_to_save" in name
    }
    assert moved == own
    assert len(own) == 4 * 5 + 2


def test_marking_adapters_as_trainable_keeps_the_saved_modules(tiny):
    model = peft.get_peft_model(tiny("bert-classifier"), BottleneckConfig(task_type="SEQ_CLS"))
    expected = {name for name, weight in model.named_parameters() if weight.requires_grad}
    model.get_base_model().bert.requires_grad_(True)
    model.base_model._mark_only_adapters_as_trainable(model.get_base_model())
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == expected
    assert len(expected) == 4 * 4 + 2


def test_gradients_equal_those_of_the_same_model_without_peft(tiny, batch):
    model = peft.get_peft_model(tiny("gpt2"), BottleneckConfig(init="bert", scaling="channel"))
    ids = batch("gpt2")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()

    plain = tiny("gpt2").requires_grad_(False)
    twins = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BottleneckLinear):
            twin = adapterkern.BottleneckAdapter(32, scaling="channel")
            twin.load_state_dict(layer.bottleneck_adapter["default"].state_dict())
            twins[f"base_model.model.{name}.bottleneck_adapter.default"] = twin
            plain.get_submodule(name).register_forward_hook(
                lambda module, inputs, y, twin=twin: y + twin(y, residual=None)
            )
    plain(input_ids=ids, labels=ids).loss.backward()
    found = gradients(model)
    assert len(found) == 4 * 5
    for prefix, twin in twins.items():
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(found[f"{prefix}.{name}"], parameter.grad)


def test_stack_trains_both_adapters(tiny, batch):
    model = peft.get_peft_model(tiny("gpt2"), BottleneckConfig(init="bert"), "french")
    model.add_adapter("legal", BottleneckConfig(init="bert"))
    model.set_adapter(["french", "legal"])
    ids = batch("gpt2")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    found = gradients(model)
    assert len(found) == 2 * 4 * 4
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.sweep("dtype", "scaling", "autocast_adapter_dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scaling", [1.0, "learned", "channel"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["float32", "half"])
def test_half_precision_model_trains(tiny, batch, dtype, scaling, autocast_adapter_dtype):
    """PEFT keeps the weights of new adapters in float32; hidden states stay as they are."""
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        expected = tiny("llama").to(dtype)(input_ids=ids).logits
    model = peft.get_peft_model(
        tiny("llama").to(dtype),
        BottleneckConfig(scaling=scaling),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    weights = {p.dtype for p in model.parameters() if p.requires_grad}
    assert weights == {torch.float32 if autocast_adapter_dtype else dtype}
    outputs = []
    layers(model)[0].register_forward_hook(lambda module, inputs, y: outputs.append(y.dtype))
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert outputs == [dtype]
    losses = train(model, {"input_ids": ids}, ids, steps=8)
    assert losses[-1] < losses[0] - 0.1


def test_autocast_trains_a_float32_model(tiny, batch):
    model = peft.get_peft_model(tiny("llama"), BottleneckConfig(init="bert", scaling="learned"))
    ids = batch("llama")["input_ids"]
    outputs = []
    layers(model)[0].register_forward_hook(lambda module, inputs, y: outputs.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert outputs == [torch.bfloat16]
    reference = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, reference, atol=0.02, rtol=0)
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


def test_float64_model_runs_in_float64(tiny, batch, output):
    model = peft.get_peft_model(tiny("llama").double(), BottleneckConfig(init="bert"))
    assert output(model, batch("llama")).dtype == torch.float64


class QuantisedLinear(nn.Module):
    """The shape of a quantised layer: integer weights, results in half precision."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max() / 127
        weight = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return (x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T).to(torch.bfloat16)


def test_quantised_layer_keeps_its_output_dtype_and_trains():
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": QuantisedLinear(nn.Linear(8, 6))})
    config = BottleneckConfig(target_modules=["proj"], bottleneck_size=3, scaling="learned")
    peft.get_peft_model(net, config)
    y = net["proj"](torch.randn(5, 8))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    adapter = net["proj"].bottleneck_adapter["default"]
    assert adapter.up_proj.weight.dtype == torch.float32
    assert adapter.up_proj.weight.grad.abs().max() > 0
    assert net["proj"].base_layer.weight.dtype == torch.int8


def test_dropout_drops_in_training_only(tiny, batch):
    model = peft.get_peft_model(tiny("llama"), BottleneckConfig(init="bert", dropout=0.5))
    for layer in layers(model):
        nn.init.normal_(layer.bottleneck_adapter["default"].up_proj.weight)
    ids = batch("llama")["input_ids"]
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, batch, use_reentrant, when):
    ids = batch("llama")["input_ids"]

    def run(checkpoint):
        base = tiny("llama").train()
        options = {"use_reentrant": use_reentrant}
        if checkpoint and when == "before":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(3)
        model = peft.get_peft_model(base, BottleneckConfig(init="bert", dropout=0.1))
        if checkpoint and when == "after":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            if use_reentrant:
                base.enable_input_require_grads()
        calls = []
        layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(4)
        model(input_ids=ids, labels=ids).loss.backward()
        return gradients(model), len(calls)

    expected, once = run(checkpoint=False)
    found, twice = run(checkpoint=True)
    assert (once, twice) == (1, 2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.thorough
def test_compiled_model_equals_the_eager_one(tiny, batch):
    """aot_eager traces forward and backward in one graph without the cost of generating code."""
    ids = batch("llama")["input_ids"]
    model = peft.get_peft_model(tiny("llama"), BottleneckConfig(init="bert"))
    model.add_adapter("other", BottleneckConfig(init="bert", bottleneck_size=3))
    model.set_adapter(["default", "other"])
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()

    torch.compiler.reset()
    base = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    compiled = base(input_ids=ids, use_cache=False).logits
    compiled.square().mean().backward()
    torch.testing.assert_close(compiled, logits)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    torch.compiler.reset()


def test_fused_path_runs(tiny, batch, caplog, clean_dispatch):
    """PEFT's bookkeeping (device moves, dtype casts, hooks) does not turn fusion off."""
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig())
    with caplog.at_level(logging.WARNING, logger="adapterkern"):
        model(**batch("bert"))
    assert not caplog.records
    adapter = layers(model)[0].bottleneck_adapter["default"]
    assert adapter.unfused_reason() is None


class Sentences(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = self.ids[index % len(self.ids)]
        return {"input_ids": row, "labels": row}


def test_trainer_trains_saves_and_resumes(tiny, batch, output, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = Sentences(batch("gpt2")["input_ids"])
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }

    def trainer(model, **options):
        return Trainer(
            model=model, args=TrainingArguments(**arguments, **options), train_dataset=data
        )

    model = peft.get_peft_model(tiny("gpt2"), BottleneckConfig(scaling="learned"))
    whole = trainer(model, max_steps=4)
    whole.train()
    logged = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]
    expected = output(model.eval(), batch("gpt2"))

    loaded = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "checkpoint-4")
    assert torch.equal(output(loaded, batch("gpt2")), expected)

    fresh = peft.get_peft_model(tiny("gpt2"), BottleneckConfig(scaling="learned"))
    resumed = trainer(fresh, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(output(fresh.eval(), batch("gpt2")), expected)
