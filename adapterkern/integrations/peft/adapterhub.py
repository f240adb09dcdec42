"""Adapter folders of AdapterHub's `adapters` into a PEFT model, and back.

AdapterHub adapts the output h of a sublayer where it joins the residual stream, and a PEFT adapter
the output y of the sublayer's last linear layer. Where AdapterHub's formula is of h alone
(`double_seq_bn`, once `houlsby`), h is y after the model's dropout, so both compute the same in
evaluation; in training, that dropout comes before AdapterHub's adapter and after PEFT's. The same
holds for `par_bn` in post-LN models, where the stream is what the FFN reads. All other formulas
need a stream that a PEFT adapter does not see; they are refused.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from adapterkern.errors import UnsupportedAdapterError
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub.configs import PRESETS, Config
from adapterkern.integrations.foreign.conversion import adapter_from_tensors
from adapterkern.integrations.peft.config import BottleneckConfig
from adapterkern.integrations.peft.layer import BottleneckLinear
from adapterkern.modules.bottleneck import BottleneckAdapter

# By model type: the module where AdapterHub keeps an adapter, and the linear layer whose output it
# adapts, both as ends of names after the layer's number.
_BERT = {"attention.output": "attention.output.dense", "output": "output.dense"}
_LLAMA = {"attention_adapters": "self_attn.o_proj", "output_adapters": "mlp.down_proj"}
PLACES: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": {"attention_adapters": "attention.out_lin", "output_adapters": "ffn.lin2"},
    "gpt2": {"attention_adapters": "attn.c_proj", "output_adapters": "mlp.c_proj"},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
# Types whose FFN reads the residual stream itself, and not the norm of it.
POST_LN = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
# The names of these activations there.
_ACTIVATIONS = {
    "gelu_tanh": "gelu_new",
    "silu": "swish",
    "leaky_relu": "leakyrelu",
    "identity": "linear",
}


def from_adapterhub(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None
) -> PeftModel:
    """Load an AdapterHub folder into a model, as an adapter of this package's PEFT method.

    Its prediction head, if it has one, is left in the folder.

    Args:
        model: a transformers model, or a PEFT model that has adapters of this method.
        folder: as AdapterHub's `save_adapter` or `adapterhub.save` writes it.
        adapter_name: in the model; None takes the name in the folder.

    Returns:
        The PEFT model; a new one has this adapter active, a given one the adapter that was.

    Raises:
        FileNotFoundError, ValueError: `adapterhub.load` refuses the folder, it is of another type
            of model, or its layers are not those of the model.
        UnsupportedAdapterError: its adapters compute what none of PEFT can.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    model_type = _model_type(base)
    checkpoint = adapterhub.load(folder, model_type=model_type)
    reasons = [*_other_maths(checkpoint.config, model_type)]
    if checkpoint.other_weights:
        reasons.append(f"it has weights of another method, {next(iter(checkpoint.other_weights))}")
    widths = sorted({adapter.bottleneck_size for adapter in checkpoint.layers.values()})
    if len(widths) > 1:
        reasons.append(f"its layers differ in bottleneck_size ({', '.join(map(str, widths))})")
    if reasons:
        listing = "".join(f"\n  - {reason}" for reason in reasons)
        raise UnsupportedAdapterError(
            f"{os.fspath(folder)} cannot become a PEFT adapter:{listing}\n"
            "  hint: adapterkern.integrations.adapterhub.patch runs it in AdapterHub's own model"
        )
    targets = {
        _linear_layer(base, layer, model_type): adapter
        for layer, adapter in checkpoint.layers.items()
    }
    name = checkpoint.name if adapter_name is None else adapter_name
    scaling = checkpoint.config["scaling"]
    config = BottleneckConfig(
        target_modules=sorted(targets),
        bottleneck_size=widths[0],
        activation=next(iter(targets.values())).activation,
        scaling=scaling,
        dropout=checkpoint.config["dropout"],
        placement="parallel" if checkpoint.config["is_parallel"] else "houlsby",
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, name)
    for layer, adapter in targets.items():
        found: Any = base.get_submodule(layer)
        found.bottleneck_adapter[name].load_state_dict(adapter.state_dict())
    return model


def to_adapterhub(
    model: PeftModel, folder: str | os.PathLike, adapter_name: str = "default"
) -> None:
    """Write an adapter as a folder that AdapterHub's `load_adapter` reads, under the same name.

    Raises:
        ValueError: an unknown adapter, or one that has modules beside it or whose layers are not
            those that AdapterHub would adapt.
        UnsupportedAdapterError: the type of model is not known here, or AdapterHub's adapters read
            something else in it.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"unknown adapter {adapter_name!r} (this model has {', '.join(model.peft_config)})."
        )
    config: Any = model.peft_config[adapter_name]
    base: Any = model.get_base_model()
    places = PLACES[_model_type(base)]
    if config.modules_to_save:
        raise ValueError(
            f"{adapter_name!r} has modules_to_save {config.modules_to_save}, for which an adapter "
            "of AdapterHub has no place."
        )
    if config.placement == "parallel" and base.config.model_type not in POST_LN:
        raise UnsupportedAdapterError(
            f"{adapter_name!r} reads what the FFN of this model of type {base.config.model_type} "
            "reads, the norm of the residual stream; AdapterHub's par_bn reads the stream itself."
        )
    layers, found = {}, set()
    for name, layer in base.named_modules():
        if not isinstance(layer, BottleneckLinear) or adapter_name not in layer.bottleneck_adapter:
            continue
        stack, rest = _split(name)
        place = next((place for place, linear in places.items() if linear == rest), None)
        if place is None:
            raise ValueError(
                f"{adapter_name!r} adapts {name}, where AdapterHub has no adapter.\n"
                f"  hint: it has them for {', '.join(places.values())}"
            )
        layers[stack + place] = _with_biases(layer.bottleneck_adapter[adapter_name])
        found.add(place)
    checkpoint = adapterhub.AdapterCheckpoint(
        adapter_name,
        layers,
        _config_of(base, config, layers, [place in found for place in places]),
        metadata={
            "model_type": base.config.model_type,
            "model_class": type(base).__name__,
            "hidden_size": base.config.hidden_size,
        },
    )
    adapterhub.save(checkpoint, folder)


def _other_maths(config: Config, model_type: str) -> Iterator[str]:
    """Reasons why no PEFT adapter computes what this configuration says."""
    if config["is_parallel"]:
        if model_type not in POST_LN:
            yield (
                f"par_bn (is_parallel): in models of type {model_type} its adapters read the "
                "residual stream, and the FFN a norm of it"
            )
        elif config["mh_adapter"] or config["cross_adapter"]:
            yield "is_parallel beside attention: a PEFT adapter can be beside an FFN alone"
    elif config["original_ln_before"]:
        yield (
            "seq_bn (original_ln_before): its adapters read the layer's output after it was added "
            "to the residual stream and, in post-LN models, normed"
        )
    if not config["original_ln_after"]:
        yield "original_ln_after=False: the model's own residual add and norm are left out"
    if config["stochastic_depth"]:
        yield "stochastic_depth: an adapter here is not dropped as a whole in training"
    if config["inv_adapter"]:
        yield "inv_adapter: the invertible adapter of the embeddings has no linear layer"


def _model_type(base: Any) -> str:
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in PLACES:
        raise UnsupportedAdapterError(
            f"model type {model_type!r} is none whose layers AdapterHub is known to adapt behind "
            f"(known: {', '.join(PLACES)})."
        )
    return model_type


def _split(name: str) -> tuple[str, str]:
    """The name up to the layer's number, and the rest."""
    match = re.fullmatch(r"(.*?\.\d+\.)(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def _linear_layer(base: nn.Module, layer: str, model_type: str) -> str:
    """The name in the model of the linear layer that an adapter of AdapterHub follows."""
    stack, place = _split(layer)
    linear = PLACES[model_type].get(place)
    wanted = f".{stack}{linear}"  # with the prefix of a head's model or without
    names = [
        name
        for name, _ in base.named_modules()
        if linear is not None
        and _split(name)[1].removesuffix(".base_layer") == linear
        and (f".{name}".endswith(wanted) or wanted.endswith(f".{name}"))
    ]
    if len(names) != 1:
        raise ValueError(
            f"{layer} of the folder has {len(names)} linear layers in this model of type "
            f"{model_type}, not one.\n  hint: load the model that the adapter was trained for"
        )
    return names[0]


def _config_of(
    base: Any, config: Any, layers: dict[str, BottleneckAdapter], places: list[bool]
) -> Config:
    """The configuration as AdapterHub writes it; saving compares it with the layers."""
    adapted = {int(re.findall(r"\d+", _split(layer)[0])[-1]) for layer in layers}
    adapter = next(iter(layers.values()))
    activation = adapter.activation
    return {
        **PRESETS["par_bn" if config.placement == "parallel" else "double_seq_bn"],
        **dict(zip(("mh_adapter", "output_adapter"), places, strict=True)),
        "non_linearity": _ACTIVATIONS.get(activation, activation),
        "reduction_factor": _factor(adapter.hidden_size, adapter.bottleneck_size),
        "scaling": config.scaling,
        "dropout": config.dropout,
        "leave_out": sorted(set(range(base.config.num_hidden_layers)) - adapted),
    }


def _factor(hidden_size: int, bottleneck_size: int) -> float:
    """The reduction factor of which AdapterHub makes this width, by hidden_size // factor."""
    exact = hidden_size / bottleneck_size
    rounds = int(hidden_size // exact) == bottleneck_size
    return exact if rounds else hidden_size / (bottleneck_size + 0.5)


def _with_biases(adapter: Any) -> BottleneckAdapter:
    """AdapterHub's always have biases; zero ones compute the same."""
    down, up = adapter.down_proj, adapter.up_proj
    return adapter_from_tensors(
        down.weight,
        up.weight,
        down.weight.new_zeros(down.out_features) if down.bias is None else down.bias,
        up.weight.new_zeros(up.out_features) if up.bias is None else up.bias,
        activation=adapter.activation,
        scaling=adapter.scaling,
        dropout=adapter.dropout,
    )
