"""adapter_names in training: the gradients of a grouped call are those of each adapter alone."""

import copy

import peft
import pytest
import torch
from mixed_models import NAMES, assert_same, gradients, randomised, weights
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from adapterkern.integrations.peft import BottleneckConfig

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
