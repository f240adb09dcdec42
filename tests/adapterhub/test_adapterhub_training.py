"""Training with the library's own trainer ends where stock ends."""

import pytest
import torch

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)
pytest.importorskip("accelerate", reason="AdapterTrainer needs accelerate")

import adapterhub_models as models
import transformers as tf
from adapters import AdapterTrainer

from adapterkern.integrations import adapterhub

STEPS = 30


class Texts(torch.utils.data.Dataset):
    """Random words; the label is whether the first is an even one."""

    def __init__(self, causal: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, models.VOCABULARY, (64, models.TOKENS), generator=generator)
        self.causal = causal

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids if self.causal else ids[0] % 2}


class Trainer(AdapterTrainer):
    """Keeps every loss as it is; the log has four digits."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", ()), loss.item()]
        return loss


def trained(name: str, preset: str, folder: str, patch: bool) -> tuple[list[float], dict]:
    """Return losses and adapter weights after STEPS steps."""
    import adapters

    torch.manual_seed(0)
    config = models.CONFIGS[name]().config
    if name == "gpt2":
        model = tf.GPT2LMHeadModel(config)
    else:
        model = tf.BertForSequenceClassification(config)
    adapters.init(model)
    model.add_adapter("task", config=preset)
    if patch:
        adapterhub.patch(model, strict=True)
    model.train_adapter("task")
    arguments = tf.TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(causal=name == "gpt2"))
    trainer.train()
    losses = trainer.losses
    weights = {n: p.detach() for n, p in model.named_parameters() if ".adapters.task." in n}
    return losses, weights


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "preset"), [("bert", "seq_bn"), ("gpt2", "double_seq_bn"), ("gpt2", "scaled_par_bn")]
)
def test_adapter_trainer_ends_with_the_same_losses_and_weights(name, preset, tmp_path):
    losses, weights = trained(name, preset, str(tmp_path / "stock"), patch=False)
    our_losses, our_weights = trained(name, preset, str(tmp_path / "patched"), patch=True)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1e-3
    assert our_losses == pytest.approx(losses, rel=1e-5)
    for key, weight in weights.items():
        torch.testing.assert_close(our_weights[key], weight, rtol=1e-5, atol=1e-5)
