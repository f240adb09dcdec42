"""Bottleneck adapters in a transformer with PEFT: train two, save, load, switch.

    pip install -e ".[peft]"
    python examples/peft_bert.py

The model is a random BERT of two layers, so that nothing is downloaded. A real one comes from
    AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from adapterkern.integrations.peft import BottleneckConfig

WORDS = 100
TASKS = {  # adapter name: from texts [B, T] to labels [B]
    "common": lambda ids: (ids[:, 0] < WORDS // 2).long(),  # is the first word a common one?
    "even": lambda ids: ids[:, 0] % 2,  # has the first word an even number?
}


def random_texts(count: int) -> torch.Tensor:
    return torch.randint(1, WORDS, (count, 8))


def base_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def train(model: PeftModel, task: str, steps: int = 150) -> None:
    model.train()
    model.set_adapter(task)  # trains this adapter and its classification head, and nothing else
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(1, steps + 1):
        ids = random_texts(64)
        loss = model(input_ids=ids, labels=TASKS[task](ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  {task}, step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: PeftModel, task: str, ids: torch.Tensor) -> float:
    model.eval()
    model.set_adapter(task)
    guesses = model(input_ids=ids).logits.argmax(-1)
    return (guesses == TASKS[task](ids)).float().mean().item()


def main() -> None:
    model = get_peft_model(
        base_model(), BottleneckConfig(task_type="SEQ_CLS", reduction_factor=4), "common"
    )
    model.add_adapter("even", BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=32))
    model.print_trainable_parameters()
    for task in TASKS:
        train(model, task)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # a subfolder for each adapter, without the base model
        loaded = PeftModel.from_pretrained(base_model(), f"{folder}/common", "common")
        loaded.load_adapter(f"{folder}/even", "even")

    ids = random_texts(1000)
    for task in TASKS:  # switching moves no weights
        before, after = accuracy(model, task, ids), accuracy(loaded, task, ids)
        print(f"{task}: accuracy {before:.3f} trained, {after:.3f} loaded")

    # Both tasks in one batch: every text names its adapter.
    names = ["common", "even"] * 500
    with torch.no_grad():
        guesses = loaded(input_ids=ids, adapter_names=names).logits.argmax(-1)
    labels = torch.stack(
        [TASKS[name](text[None])[0] for name, text in zip(names, ids, strict=True)]
    )
    print(f"mixed batch: accuracy {(guesses == labels).float().mean().item():.3f}")


if __name__ == "__main__":
    main()
