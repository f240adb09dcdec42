"""The layers to adapt: defaults by structure, and checks that a layer can be adapted."""

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from adapterkern.integrations.peft.blocks import Blocks, find_blocks, output_size, walk

logger = logging.getLogger("adapterkern")

# Model types whose default targets the tests compare name by name. Those of any other type are
# found in the same way, and the log says which.
TESTED = frozenset([
    "albert", "arcee", "audio-spectrogram-transformer", "bart", "beit", "bert", "big_bird",
    "blenderbot", "blenderbot-small", "bloom", "camembert", "clip", "codegen", "cohere",
    "cohere2", "data2vec-audio", "data2vec-text", "data2vec-vision", "deberta", "deberta-v2",
    "deepseek_v3", "deit", "dinov2", "dinov3_vit", "distilbert", "electra", "ernie", "esm",
    "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "helium", "hubert", "layoutlm",
    "llama", "llava", "longformer", "m2m_100", "marian", "mbart", "ministral", "mistral",
    "mixtral", "modernbert", "mpnet", "mpt", "mt5", "nemotron", "olmo", "olmo2", "openai-gpt",
    "opt", "pegasus", "persimmon", "phi", "phi3", "plbart", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "rembert", "roberta", "roformer", "sew", "siglip", "smollm3", "stablelm",
    "starcoder2", "t5", "t5gemma", "umt5", "unispeech", "vit", "wav2vec2", "whisper", "xlm-roberta",
    "xlm-roberta-xl",
])  # fmt: skip
SHOWN = 3  # problems spelled out in an error


def default_targets(
    model: nn.Module, model_type: str | None, placement: str
) -> tuple[list[str], list[str]]:
    """Suffixes of the layers that a placement adapts, and of those that these would hit beside.

    Raises:
        ValueError: it is not clear which layers these are; the message says why, tells how to name
            layers and lists the model's.
    """
    blocks = find_blocks(model)
    sites = _sites(blocks, placement)
    targets = list(dict.fromkeys(map(_tail, sites)))
    beside = {name for name, _ in walk(model) if _ends_in(name, targets)} - set(sites)
    excluded = sorted(set(map(_tail, beside)))
    problems = [*blocks.problems]
    if not problems and not sites:
        problems.append("its FFNs are mixtures of experts, which have no dense output projection")
    problems += [f"{name} ends as {other}" for name in sites if (other := _ends_in(name, excluded))]
    if problems:
        raise _unclear(model, model_type, placement, problems)
    shown = ", ".join(targets)
    if model_type not in TESTED:
        log_once(
            f"adapterkern: default target_modules of model type {model_type!r}, found by structure "
            f"and not tested: {shown}. BottleneckConfig(target_modules=[...]) names others."
        )
    if blocks.experts:
        log_once(
            f"adapterkern: the experts of this {model_type!r} model get no adapters "
            f"({', '.join(_patterns(blocks.experts))}); its dense layers do: {shown}."
        )
    return targets, excluded


def _sites(blocks: Blocks, placement: str) -> list[str]:
    if placement == "parallel":
        return list(parallel_inputs(blocks))
    return [*(blocks.attention if placement == "houlsby" else []), *blocks.feed_forward]


def parallel_inputs(blocks: Blocks) -> dict[str, str]:
    """The layers that end a whole FFN, each with one that reads its input: no shared experts."""
    experts = tuple(f"{name}." for name in blocks.experts)
    return {name: up for name, up in blocks.feed_forward.items() if not name.startswith(experts)}


def check_parallel(blocks: Blocks, name: str) -> None:
    """Raise ValueError where a layer does not end an FFN whose input can be told."""
    possible = parallel_inputs(blocks)
    if name not in possible:
        why = "; ".join(blocks.problems[:SHOWN]) or "it is not the last layer of a dense FFN"
        raise ValueError(
            f'placement="parallel" cannot adapt {name}: {why}.\n'
            f"  hint: target_modules=None takes the FFNs of a model where they can be told "
            f"(in this one: {', '.join(_patterns(possible)) or 'none'})"
        )


def _unclear(
    model: nn.Module, model_type: str | None, placement: str, problems: list[str]
) -> ValueError:
    names = (name for name, module in walk(model) if output_size(module) is not None)
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return ValueError(
        f'model type {model_type!r} has no default target_modules for placement="{placement}": '
        f"{'; '.join(problems[:SHOWN])}{more}.\n"
        "  hint: BottleneckConfig(target_modules=[...]) takes name suffixes of the linear layers "
        'that adapters should follow, as in ["self_attn.o_proj", "mlp.down_proj"], or one regular '
        'expression, or "all-linear"\n'
        f"  linear layers of this model: {', '.join(_patterns(names))}"
    )


def _patterns(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names))


def _tail(name: str) -> str:
    """What follows the last number of a name, which is the same in every block."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def _ends_in(name: str, suffixes: Iterable[str]) -> str | None:
    """The first suffix that PEFT finds a name to end in."""
    return next((one for one in suffixes if name == one or name.endswith(f".{one}")), None)


@functools.cache
def log_once(message: str) -> None:
    """Log a warning, unless this process did."""
    logger.warning(message)


def report_suffixes(config: Any, names: list[str], matches: Callable[[Any, str], Any]) -> None:
    """Log where a suffix that is a layer's whole name within its block hits another's end too."""
    if not isinstance(config.target_modules, list):
        return
    tails = set(map(_tail, (name for name in names if matches(config, name))))
    for suffix in tails.intersection(config.target_modules):
        others = sorted(
            tail for tail in tails - set(config.target_modules) if _ends_in(tail, [suffix])
        )
        if others:
            log_once(
                f"adapterkern: target_modules {suffix!r} adapts {', '.join(others)} too, since "
                f"PEFT compares the ends of names; exclude_modules={others} leaves them out."
            )


# PEFT adds these heads to modules_to_save for these tasks, whichever of them the model has.
HEADS = ("classifier", "score", "qa_outputs")
TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def check_layers(config: Any, names: list[str], matches: Callable[[Any, str], Any]) -> None:
    """Raise ValueError where layers_to_transform has a layer without a target; PEFT skips those.

    `matches` is PEFT's own rule whether a configuration adapts the module of a name.
    """
    if not config.layers_to_transform:
        return
    probe = copy.copy(config)

    def adapts(layer: int) -> bool:
        probe.layers_to_transform = [layer]
        return any(matches(probe, name) for name in targets)

    probe.layers_to_transform = None
    targets = [name for name in names if matches(probe, name)]
    numbers = {int(part) for name in targets for part in name.split(".") if part.isdigit()}
    there = [layer for layer in sorted(numbers) if adapts(layer)]
    missing = sorted(set(config.layers_to_transform) - set(there))
    if missing and there:  # PEFT itself refuses where nothing matches
        raise ValueError(
            f"layers_to_transform names layers without a target: {', '.join(map(str, missing))}.\n"
            f"  hint: the targets of this model are in layers {', '.join(map(str, there))}"
        )


def check_modules_to_save(config: Any, names: list[str]) -> None:
    """Raise ValueError where modules_to_save has a name that fits no module; PEFT skips those."""
    added = HEADS if config.task_type in TASKS_WITH_HEADS else ()
    unknown = [
        wanted
        for wanted in config.modules_to_save or []
        if wanted not in added and not any(name.endswith(wanted) for name in names)
    ]
    if unknown:
        last = dict.fromkeys(name.rpartition(".")[2] for name in names)
        raise ValueError(
            f"modules_to_save names no module of this model: {', '.join(unknown)}.\n"
            "  hint: its modules end in " + ", ".join(name for name in last if not name.isdigit())
        )


def check_target(name: str, layer: nn.Module, parent: nn.Module) -> None:
    """Raise ValueError where no adapter can follow a layer, or the model would bypass it."""
    if output_size(layer) is None:
        raise ValueError(
            f"cannot adapt {name}: {type(layer).__name__} is no linear layer (no out_features).\n"
            "  hint: let target_modules match linear layers only, or use exclude_modules"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"cannot adapt {name}: nn.MultiheadAttention reads its weights and never calls it.\n"
            "  hint: leave it out with exclude_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:
        raise ValueError(
            f"cannot adapt {name}: nn.TransformerEncoderLayer reads its weights and does not call "
            "it, in evaluation.\n"
            "  hint: set activation_relu_or_gelu = 0 on each encoder layer, and it is called"
        )
