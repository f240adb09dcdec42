"""Configurations as the library writes them, resolved without it to a dict of all fields."""

import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterkern.activations import canonical_name
from adapterkern.errors import UnsupportedAdapterError
from adapterkern.integrations.adapterhub.reasons import REASONS

Config = dict[str, Any]

# The fields of the library's BnConfig that have a default there.
DEFAULTS: Config = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
_SEQ: Config = {
    **DEFAULTS,
    "original_ln_before": True,
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 16,
}
_DOUBLE: Config = {
    **DEFAULTS,
    "mh_adapter": True,
    "output_adapter": True,
    "non_linearity": "swish",
    "reduction_factor": 16,
}
_PARALLEL: Config = {
    **DEFAULTS,
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 2,
    "init_weights": "mam_adapter",
    "is_parallel": True,
    "scaling": 4.0,
}
_NICE: Config = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
_PHM: Config = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
PRESETS: dict[str, Config] = {
    "seq_bn": _SEQ,
    "double_seq_bn": _DOUBLE,
    "par_bn": _PARALLEL,
    "scaled_par_bn": {**_PARALLEL, "scaling": "learned"},
    "seq_bn_inv": {**_SEQ, **_NICE},
    "double_seq_bn_inv": {**_DOUBLE, **_NICE},
    "compacter++": {**_SEQ, **_PHM},
    "compacter": {**_DOUBLE, **_PHM},
}
# Presets of other methods, which may be in a union but have no bottleneck adapter.
_OTHERS = (
    *("prefix_tuning", "prefix_tuning_flat", "prompt_tuning", "mtl_lora", "lora", "ia3"),
    *("vera", "dora", "dvora", "loreft", "noreft", "direft"),
)
# Presets that are unions: their bottleneck adapter, and the fields that all their parts have.
_ALL_HAVE = {"leave_out", "dropout", "use_gating", "init_weights_seed"}
_UNIONS: dict[str, tuple[Config, set[str]]] = {
    "mam": (_PARALLEL, _ALL_HAVE | {"non_linearity"}),
    "unipelt": ({**_SEQ, "use_gating": True}, _ALL_HAVE),
}
_ALIASES = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
    "pfeiffer+inv": "seq_bn_inv",
    "houlsby+inv": "double_seq_bn_inv",
}
# The names of these activations in files that do not record the library's version.
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_LEAST_FACTOR = 1e-3  # R = 1000 H: what is below is no size that anybody means
_MOST_LAYERS = 1000  # no model is so deep
_LONGEST = 1000  # characters of a preset with its fields
# The library's names of activations that are not aliases in `adapterkern.activations`.
_ACTIVATIONS = {"linear": "identity", "gelu_pytorch_tanh": "gelu_tanh"}


def resolve(config: Any, versioned: bool) -> list[Config]:
    """The bottleneck configurations that a saved one stands for, with all defaults.

    Args:
        config: a dict of fields, the name of a preset with or without [field=value, ...], several
            of those joined by |, or a union of configurations.
        versioned: whether the file names the library's version. Where it does not, "gelu" in a dict
            of fields means "gelu_new" and "gelu_orig" means "gelu".

    Raises:
        ValueError: it is none of these, names no bottleneck adapter, or a field is not valid.
        UnsupportedAdapterError: the adapters have no `BottleneckAdapter`; the message says why.
    """
    parts = [part for member in _members(config) for part in _resolve_part(member)]
    if not parts:
        raise ValueError(
            f"the configuration has no bottleneck adapter: {config!r}.\n"
            "  hint: adapterkern reads bottleneck adapters alone, not LoRA, prefix tuning or others"
        )
    for part in parts:
        problems = [
            f"{name} must be {expected}, got {part[name]!r}"
            for name, (expected, holds) in _FIELDS.items()
            if not holds(part[name])
        ]
        if problems:
            raise ValueError(f"the configuration is not valid: {'; '.join(problems)}.")
        part["leave_out"] = list(part["leave_out"])  # the default list is shared
        if _is_number(part["scaling"]):
            part["scaling"] = float(part["scaling"])  # the library takes no other number
        if not versioned and isinstance(config, Mapping) and not is_union(config):
            name = part["non_linearity"]
            part["non_linearity"] = _RENAMED.get(name, name)
        _refuse_unsupported(part)
    return parts


def is_union(config: Any) -> bool:
    """Whether a configuration, as saved, is one of several methods or places at once."""
    if isinstance(config, str):
        return "|" in config or config.partition("[")[0].strip() in _UNIONS
    return isinstance(config, Mapping) and config.get("architecture") == "union"


def _members(config: Any) -> Sequence[Any]:
    """The parts of a union, or the configuration alone; a preset that is a union counts as one."""
    if isinstance(config, str):
        members: Any = [part.strip() for part in config.split("|")]
        if len(members) == 1:
            return members
    elif is_union(config):
        members = config.get("configs")
        if not isinstance(members, Sequence) or isinstance(members, str):
            raise ValueError(f"configs of a union must be a list, got {members!r}.")
    else:
        return [config]
    inner = [member for member in members if is_union(member)]
    if inner:
        raise ValueError(
            f"a union cannot be part of a union, got {inner[0]!r} in {config!r}.\n"
            "  hint: name its parts themselves"
        )
    return members


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds: not NaN, not infinite, not an integer beyond both."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _is_factor(value: Any) -> bool:
    return _is_number(value) and value >= _LEAST_FACTOR


def _are_factors(value: Any) -> bool:
    return all(map(_is_factor, value.values() if isinstance(value, Mapping) else [value]))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_layer(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_LAYERS


_FLAGS = (
    *("mh_adapter", "output_adapter", "cross_adapter", "is_parallel", "use_gating", "phm_layer"),
    *("original_ln_before", "original_ln_after", "ln_before", "ln_after"),
    "adapter_residual_before_ln",
)
# The requirement on each field, in words and as a test; the library itself checks none.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "reduction_factor": (
        f'a number of at least {_LEAST_FACTOR}, or a dict of layer numbers and "default" to such',
        _are_factors,
    ),
    "non_linearity": ("the name of an activation", lambda value: isinstance(value, str)),
    "scaling": (
        'a number, "learned" or "channel"',
        lambda value: _is_number(value) or value in ("learned", "channel"),
    ),
    "dropout": ("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    "leave_out": (
        f"a list of layer numbers below {_MOST_LAYERS}",
        lambda value: isinstance(value, list | tuple) and all(map(_is_layer, value)),
    ),
    **dict.fromkeys(_FLAGS, ("true or false", _is_flag)),
    "residual_before_ln": (
        'true, false or "post_add"',
        lambda value: _is_flag(value) or value == "post_add",
    ),
}


def _resolve_part(config: Any) -> list[Config]:
    """Resolve one part of a union to a list; it is empty if the part is no bottleneck adapter."""
    if isinstance(config, str):
        return _preset(config)
    if not isinstance(config, Mapping):
        raise ValueError(f"a configuration is a dict or the name of a preset, got {config!r}.")
    if config.get("architecture") not in (None, "bottleneck"):
        return []
    config = {**DEFAULTS, **config}
    invertible = config.pop("invertible_adapter", None)
    if invertible:  # as the first versions wrote it
        if not isinstance(invertible, Mapping) or not {"block_type", "reduction_factor"} <= set(
            invertible
        ):
            raise ValueError(
                "invertible_adapter must be a dict of block_type and reduction_factor, "
                f"got {invertible!r}."
            )
        config["inv_adapter"] = invertible["block_type"]
        config["inv_adapter_reduction_factor"] = invertible["reduction_factor"]
    missing = [
        name
        for name in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
        if name not in config
    ]
    if missing:
        raise ValueError(
            f"the configuration lacks {', '.join(missing)}: it is not one of a bottleneck adapter."
        )
    return [config]


def _preset(text: str) -> list[Config]:
    if len(text) > _LONGEST:
        raise ValueError(f"the name of a configuration has {len(text)} characters: {text[:40]}...")
    match = re.fullmatch(r"([^\[\]|]+)(?:\[(.*)\])?", text)
    name = _ALIASES.get(match[1], match[1]) if match else ""
    if not match or name not in (*PRESETS, *_OTHERS, *_UNIONS):
        known = ", ".join((*PRESETS, *_UNIONS, *_OTHERS))
        raise ValueError(f"unknown configuration {text!r}.\n  hint: known presets are {known}.")
    pairs = re.sub(r"(\w+)=", r"'\1':", match[2] or "")
    try:
        fields = ast.literal_eval("{" + pairs + "}")
        if not isinstance(fields, dict):
            raise ValueError("not field=value")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"the fields of the configuration {text!r} cannot be read.") from error
    preset, allowed = _UNIONS.get(name) or (PRESETS.get(name), set(fields))
    if not set(fields) <= allowed:
        raise ValueError(
            f"{text!r} sets {', '.join(sorted(set(fields) - allowed))}, which not all parts of the "
            f"union {name!r} have; those are {', '.join(sorted(allowed))}.\n"
            "  hint: name the parts, such as prefix_tuning[...]|par_bn[...]"
        )
    return [{**preset, **fields}] if preset else []


def _refuse_unsupported(config: Config) -> None:
    found = {
        "phm": config["phm_layer"],
        "gating": config["use_gating"],
        "ln_before": config["ln_before"],
        "ln_after": config["ln_after"],
    }
    why = [f"{reason}: {REASONS[reason]}" for reason, present in found.items() if present]
    try:
        canonical_name(activation_of(config))
    except ValueError as error:
        why.append(f"activation: non_linearity is {config['non_linearity']!r}; {error}")
    if why:
        listing = "".join(f"\n  - {line}" for line in why)
        raise UnsupportedAdapterError(f"the adapter has no BottleneckAdapter:{listing}")


def activation_of(config: Config) -> str:
    """The activation of a configuration, by a name that `BottleneckAdapter` knows."""
    name = config["non_linearity"].lower()
    return _ACTIVATIONS.get(name, name)
