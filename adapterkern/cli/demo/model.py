"""A pre-trained text encoder with one linear head per task, and the three ways of training it."""

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkern.cli.demo.corpus import Task
from adapterkern.cli.demo.recipes import RECIPES, Recipe
from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear
from adapterkern.modules.bottleneck import BottleneckAdapter

LABELS = {
    "adapters": "bottleneck adapters",
    "lora": "LoRA, same budget",
    "full": "full fine-tuning",
}
MAX_LENGTH = 48  # tokens; two docstrings in three fit, and a run stays short

# transformers raises these for incomplete folders, depending on the gap and on its version.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError)


class ModelError(RuntimeError):
    """The base model cannot be loaded or does not fit the demo."""


class TextClassifier(nn.Module):
    """logits = head[task](mean of the encoder's last hidden states over the real tokens).

    The heads stand outside the encoder, one nn.Linear for each task: tasks differ in their number
    of classes, which PEFT's `modules_to_save` does not allow. `save_task` stores a head beside its
    adapter.
    """

    encoder: Any  # a transformers model, or the PeftModel around it

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.num_base = sum(p.numel() for p in encoder.parameters())
        self.encoder = encoder
        self.heads: Any = nn.ModuleDict()

    def add_head(self, task: Task) -> None:
        size = self.encoder.config.hidden_size
        device = next(self.encoder.parameters()).device
        self.heads[task.name] = nn.Linear(size, len(task.labels), device=device)

    def forward(self, task_name: str, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, classes] from ids and mask [B, L]; the active adapter is the caller's choice."""
        return self.heads[task_name](self.features(ids, mask))

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, H], what a head reads of each text."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, L, H]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def load_encoder(source: str, device: torch.device) -> nn.Module:
    """The bare encoder in float32, without its pooler (the demo pools by the mean).

    Args:
        source: a folder, or the name of a model on the Hugging Face hub.

    Raises:
        ModelError: nothing loadable there, or not a model that reads text alone.
    """
    with _quiet_transformers():
        try:
            encoder = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        except LOADING_ERRORS as error:
            raise ModelError(
                f"cannot load the model in {source!r}: {_first_line(error)}"
            ) from error
    if encoder.config.is_encoder_decoder or not hasattr(encoder.config, "hidden_size"):
        raise ModelError(
            f"the demo needs an encoder-only or decoder-only text model, {source!r} is "
            f"{type(encoder).__name__}."
        )
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder.to(device)


def load_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside the model; where it has no padding token, the end-of-text token pads."""
    with _quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except LOADING_ERRORS as error:
            raise ModelError(
                f"cannot load the tokenizer in {source!r}: {_first_line(error)}"
            ) from error
    known = set(tokenizer("Return the value")["input_ids"]) - set(tokenizer.all_special_ids)
    if not known:  # transformers makes an empty tokenizer where the files of one are missing
        raise ModelError(f"the tokenizer in {source!r} knows no word; are its files complete?")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_task(
    model: TextClassifier | None,
    method: str,
    task: Task,
    source: str,
    device: torch.device,
    lora_rank: int,
    recipe: Recipe | None = None,
) -> TextClassifier:
    """A classifier whose parameters that require gradients are the ones to train for `task`.

    Adapters and LoRA add the task to the `model` of the task before, whose own adapter does not
    change. Full fine-tuning starts from a fresh base each time, to its advantage: a model a task.

    Args:
        recipe: of the method; None takes the demo's.
    """
    if method == "full":
        model = TextClassifier(load_encoder(source, device))
        model.add_head(task)
        return model
    recipe = recipe or RECIPES[method]
    config = adapter_config(recipe) if method == "adapters" else lora_config(lora_rank, recipe)
    if model is None:
        encoder = load_encoder(source, device)
        model = TextClassifier(encoder)
        with _model_fits(source), _quiet_transformers():
            model.encoder = peft.get_peft_model(encoder, config, adapter_name=task.name)
    else:
        model.encoder.add_adapter(task.name, config)
    model.encoder.set_adapter(task.name)
    model.add_head(task)
    return model


def adapter_config(recipe: Recipe) -> BottleneckConfig:
    """The adapters of a recipe, by default the demo's."""
    return BottleneckConfig(**recipe.settings)


def lora_config(rank: int, recipe: Recipe) -> peft.LoraConfig:
    """LoRA of a recipe, with this rank in every layer that it targets."""
    alpha = recipe.settings["alpha_over_rank"] * rank
    targets = recipe.settings["target_modules"]
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)


def lora_rank_for(budget: int, source: str, recipe: Recipe = RECIPES["lora"]) -> int:
    """The LoRA rank whose number of parameters, linear in the rank, comes closest to `budget`."""
    encoder = load_encoder(source, torch.device("cpu"))
    with _model_fits(source), _quiet_transformers():
        probe = peft.get_peft_model(encoder, lora_config(1, recipe))
    return max(1, round(budget / num_trained(probe)))


def describe_method(method: str, lora_rank: int) -> dict[str, object]:
    """The settings of a method, for the record."""
    recipe = RECIPES[method]
    facts = {"recipe": recipe.name, "head_learning_rate": recipe.head_learning_rate}
    if method == "lora":
        facts["rank"] = lora_rank
    if method == "full":
        facts["one_model_per_task"] = True
    return {**facts, **recipe.settings}


def num_trained(module: nn.Module) -> int:
    """Parameters that require a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def adapters_of(encoder: nn.Module) -> list[BottleneckAdapter]:
    """The active adapters, in the order of the sublayers."""
    layers = [module for module in encoder.modules() if isinstance(module, BottleneckLinear)]
    return [
        cast(BottleneckAdapter, layer.bottleneck_adapter[name])
        for layer in layers
        for name in layer.active_adapters
    ]


def save_task(model: TextClassifier, task: Task, source: str, folder: Path) -> Path:
    """Adapter, head and labels of a task in `folder`/<task>, which appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        with _quiet_transformers():
            model.encoder.save_pretrained(scratch, selected_adapters=[task.name])
        fresh = Path(scratch) / task.name
        head = {
            name: tensor.contiguous().cpu()
            for name, tensor in model.heads[task.name].state_dict().items()
        }
        save_file(head, fresh / "head.safetensors")
        description = {
            "task": task.name,
            "labels": task.labels,
            "base_model": source,
            "max_length": MAX_LENGTH,
            "pooling": "mean over the real tokens",
        }
        (fresh / "task.json").write_text(json.dumps(description, indent=2) + "\n")
        place, previous = folder / task.name, Path(scratch) / "previous"
        try:
            if place.exists():
                os.replace(place, previous)
            os.replace(fresh, place)
        except BaseException:  # Ctrl-C between the two: the earlier one takes its place again
            if previous.exists() and not place.exists():
                os.replace(previous, place)
            raise
    return place


def load_task(folder: Path, source: str, device: torch.device) -> TextClassifier:
    """The opposite of `save_task`: a fresh base model with the adapter and the head in `folder`."""
    description = json.loads((folder / "task.json").read_text())
    task = Task(description["task"], tuple(description["labels"]))
    model = TextClassifier(load_encoder(source, device))
    with _quiet_transformers():
        model.encoder = peft.PeftModel.from_pretrained(
            model.encoder, str(folder), adapter_name=task.name
        )
    model.add_head(task)
    model.heads[task.name].load_state_dict(
        load_file(folder / "head.safetensors", device=str(device))
    )
    return model


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence progress bars, notes about unused weights or an unreachable hub (the error tells),
    and deprecations between libraries.
    """
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _model_fits(source: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ModelError(f"adapters do not fit into {source!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
