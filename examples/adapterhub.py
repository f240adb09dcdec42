"""A script that uses AdapterHub's `adapters`, before and after the one line that makes it fused.

    pip install -e ".[adapterhub]" accelerate
    python examples/adapterhub.py

The model is a random BERT of two layers, so that nothing is downloaded. A real one comes from
    AutoAdapterModel.from_pretrained("bert-base-uncased")
"""

import tempfile
import time

import adapters
import torch
from adapters import AdapterTrainer
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from adapterkern.integrations import adapterhub

WORDS = 100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Texts(torch.utils.data.Dataset):
    """Random words; the label says whether the first one is common."""

    def __init__(self, count: int = 512) -> None:
        self.ids = torch.randint(1, WORDS, (count, 16))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": (self.ids[index][0] < WORDS // 2).long()}


def users_script(fused: bool) -> tuple[float, torch.Tensor, str]:
    """Train an adapter, save it, load it into a fresh model and predict."""
    torch.manual_seed(0)
    model = base_model()
    model.add_adapter("task", config="seq_bn")
    if fused:
        report = adapterhub.patch(model)  # the one line
        print(report)
    model.train_adapter("task")

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=60,
            per_device_train_batch_size=32,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = AdapterTrainer(model=model, args=arguments, train_dataset=Texts())
        loss = trainer.train().training_loss
        model.save_adapter(folder, "task")  # the library's own format, patched or not

        saved = adapterhub.load(folder)  # which also reads without the library
        assert len(saved.layers) == 2
        fresh = base_model()
        fresh.load_adapter(folder, set_active=True)

    if fused:
        adapterhub.patch(fresh)
    ids = Texts(64).ids.to(DEVICE)
    with torch.no_grad():
        return loss, fresh.eval().to(DEVICE)(input_ids=ids).logits.cpu(), milliseconds(fresh, ids)


def base_model() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = BertForSequenceClassification(config)
    adapters.init(model)
    return model


@torch.no_grad()
def milliseconds(model: torch.nn.Module, ids: torch.Tensor) -> str:
    """The best of 20 forward passes."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        model(input_ids=ids)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return f"{min(times) * 1e3:.2f} ms"


def main() -> None:
    loss, logits, stock_time = users_script(fused=False)
    fused_loss, fused_logits, fused_time = users_script(fused=True)
    difference = (logits - fused_logits).abs().max().item()
    print(f"mean training loss: {loss:.6f} before, {fused_loss:.6f} after")
    print(f"largest difference of the logits: {difference:.1e}")
    print(f"forward pass of 64 texts on {DEVICE}: {stock_time} before, {fused_time} after")
    if DEVICE == "cpu":
        print("(the CPU runs plain PyTorch operations either way: no claim about speed)")
    assert abs(loss - fused_loss) < 1e-4
    assert difference < 1e-3


if __name__ == "__main__":
    main()
