"""Checks that an adapter folder has valid entries and the weights its configuration names."""

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.integrations.adapterhub.configs import Config
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.validation import FLOAT_DTYPES, name_of

Layers = Mapping[str, Mapping[str, Tensor]]  # layer to parameter to tensor
# The name before a layer's number (the stack) to the name after it (the location) to the numbers.
Stacks = dict[str, dict[str, set[int]]]

# The modules in which the library keeps adapters by name.
_HOLDERS = (
    r"(?:^|\.)(?:\w*adapters|prefix_tunings|prefix_gates|loras|refts|prompt_tunings"
    r"|shared_parameters)\."
)
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,6}(?![^.])")
MOST_BYTES = 1 << 20  # of a configuration file; the library's largest, UniPELT's, has 3 kB
_MOST_MISSING = 20  # layers told of one location


def entry_problems(meta: Mapping[str, Any]) -> list[str]:
    """A sentence for every invalid entry beside the configuration."""
    size = meta.get("hidden_size")
    return [
        f"{name} must be {expected}, got {meta[name]!r}"
        for name, expected, holds in (
            ("name", "a string", isinstance(meta["name"], str)),
            ("hidden_size", "a positive integer", size is None or (type(size) is int and size > 0)),
        )
        if not holds
    ]


def unwritable(meta: Mapping[str, Any]) -> list[str]:
    """A sentence for every entry with which the library would not load the folder.

    It makes the name a key of an `nn.ModuleDict`, which refuses the names of its attributes.
    """
    problems = entry_problems(meta)
    name, version = meta["name"], meta["version"]
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        problems.append(
            'name must be a string without ".", not empty and no attribute of nn.ModuleDict, '
            f"got {name!r}"
        )
    if not isinstance(version, str):
        problems.append(f"version must be a string or not in the metadata, got {version!r}")
    if (size := len(json.dumps(meta))) > MOST_BYTES // 2:  # it is written with spaces
        problems.append(
            f"the configuration and the metadata have {size} bytes, over {MOST_BYTES // 2}"
        )
    return problems


def wrong_kinds(
    name: object, layers: object, other_weights: object, entries: Mapping[str, object]
) -> list[str]:
    """A sentence for every part of a checkpoint whose type no folder can hold."""
    problems = [] if isinstance(name, str) else [f"name must be a string, got {name!r}"]
    for title, mapping, kind in (
        ("layers", layers, BottleneckAdapter),
        ("other_weights", other_weights, Tensor),
        ("metadata", entries["metadata"], object),
    ):
        if not isinstance(mapping, Mapping):
            problems.append(f"{title} must be a dict, got a {type(mapping).__name__}")
            continue
        problems += [
            f"{title}[{key!r}] must be a {kind.__name__}, got a {type(value).__name__}"
            for key, value in mapping.items()
            if not isinstance(value, kind)
        ]
    for title, entry in {"layers": layers, "other_weights": other_weights, **entries}.items():
        problems += [
            f"the keys of {title} must be strings, got {key!r}"
            for key in (entry if isinstance(entry, Mapping) else ())
            if not isinstance(key, str)
        ]
    for title, entry in entries.items():
        parts = entry.items() if isinstance(entry, Mapping) else [(None, entry)]
        for key, value in parts:
            try:
                json.dumps(value, sort_keys=True)
            except (TypeError, ValueError, RecursionError) as error:
                place = title if key is None else f"{title}[{key!r}]"
                problems.append(f"{place} must be what JSON can hold, got {value!r} ({error})")
    return problems


def renamed(
    weights: Mapping[str, Tensor], old: str | None, name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of other methods to the present name; tell which would be lost."""
    pattern = re.compile(rf"({_HOLDERS})(?:{re.escape(old or name)}|{re.escape(name)})\.")
    moved: dict[str, Tensor] = {}
    problems = []
    for key, tensor in weights.items():
        new, found = pattern.subn(lambda match: f"{match[1]}{name}.", key, count=1)
        if not found and old != name:  # without a new name, all other weights are copied
            problems.append(f"other_weights[{key!r}] is not of the adapter {old or name!r}")
        elif new in moved or f".adapters.{name}." in new:
            problems.append(f"other_weights[{key!r}] would take another weight's place, {new}")
        moved[new] = tensor
    return moved, problems


def tensor_problems(layers: Layers, other: Mapping[str, Tensor]) -> list[str]:
    """A sentence for every tensor that is not plain memory, or that no adapter computes with."""
    problems = [
        f"{layer}: the {problem}"
        for layer, tensors in layers.items()
        for problem in _problems_of_one(tensors)
    ]
    return problems + [
        f"{key} {problem}" for key, tensor in other.items() if (problem := _oddity(tensor))
    ]


def _problems_of_one(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = [
        f"{name} {problem}" for name, tensor in tensors.items() if (problem := _oddity(tensor))
    ]
    problems += [
        f"{name} is {name_of(tensor.dtype)}, none of {', '.join(map(name_of, FLOAT_DTYPES))}"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES
    ]
    if not problems and len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {name_of(tensor.dtype)}" for name, tensor in tensors.items())
        problems = [f"tensors differ in dtype: {found}"]
    return problems


def _oddity(tensor: Tensor) -> str | None:
    """What keeps a tensor from being copied as it is: its memory is missing, packed or shared."""
    if type(tensor) not in _torch.ORDINARY or tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        return f"must be a plain dense tensor, got a {type(tensor).__name__}, {layout}"
    if tensor.is_meta:
        return "is on the meta device"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return (
            f"has the shape {list(tensor.shape)} and only {tensor.untyped_storage().nbytes()} bytes"
        )
    return None


def problems_of(
    layers: Layers, configs: list[Config], hidden_size: int | None, num_layers: int | None = None
) -> list[str]:
    """A sentence for every difference between the weights and the configuration.

    Names of layers do not tell how many there are: without `num_layers` there is no sentence if the
    last ones of a stack are missing in all locations, or a whole stack such as the encoder's.
    """
    config = configs[0]
    if any(_weight_fields(other) != _weight_fields(config) for other in configs[1:]):
        return ["its union has bottleneck configurations that differ in more than their places"]
    if not layers:
        return ["it holds no weight of this adapter"]
    stacks = _stacks_of(layers)
    left_out = {number for c in configs for number in c["leave_out"]}
    problems = []
    for layer, tensors in layers.items():
        factors = _factors(layer, config["reduction_factor"], stacks, left_out)
        problems += [
            f"{layer}: {problem}"
            for problem in _layer_problems(tensors, config, factors, hidden_size)
        ]
    for stack, locations in stacks.items():
        problems += _location_problems(stack, locations, configs, len(stacks) > 1)
        if num_layers is None:
            count = 1 + max(set().union(*locations.values()))
        else:
            count = num_layers
        for location, present in locations.items():
            missing = (
                f"{stack}{number}{location} is missing"
                for number in range(count)
                if number not in present
                and left_out.isdisjoint(_indices(number, stack, stacks, left_out))
            )
            problems += islice(missing, _MOST_MISSING)
            problems += [
                f"{stack}{number}{location} is there, but num_layers is {count}"
                for number in sorted(present)
                if number >= count
            ]
    return problems


def _weight_fields(config: Config) -> tuple:
    return tuple(
        config[name] for name in ("non_linearity", "scaling", "dropout", "reduction_factor")
    )


def _stacks_of(layers: Layers) -> Stacks:
    stacks: Stacks = {}
    for layer in layers:
        number = _NUMBER.search(layer)
        if number:
            locations = stacks.setdefault(layer[: number.start()], {})
            locations.setdefault(layer[number.end() :], set()).add(int(number[0]))
    return stacks


def _indices(number: int, stack: str, stacks: Stacks, left_out: set[int]) -> set[int]:
    """The numbers that `leave_out` and `reduction_factor` may have for this layer.

    They continue in a second stack where the first ends, whose last layers may be left out.
    """
    if not any(word in stack for word in ("decoder", "vision")):  # the library's second stacks
        return {number}
    counts = [1 + max(set().union(*places.values())) for s, places in stacks.items() if s != stack]
    first = max(counts, default=0)
    return {number, *range(number + first, number + first + len(left_out) + 1)}


def _factors(layer: str, factor: object, stacks: Stacks, left_out: set[int]) -> set[float]:
    """The reduction factors that a layer may have; none if the configuration has none for it."""
    if not isinstance(factor, Mapping):
        return {factor}  # type: ignore[arg-type]  # checked with the configuration
    number = _NUMBER.search(layer)
    if not number:
        return set(factor.values())
    indices = _indices(int(number[0]), layer[: number.start()], stacks, left_out)
    found = {factor.get(str(index), factor.get("default")) for index in indices}
    return found - {None}


def _location_problems(
    stack: str, locations: dict[str, set[int]], configs: list[Config], has_others: bool
) -> list[str]:
    """Locations without a layer; they are only counted, as their names differ between models."""
    # Only a decoder has cross-attention, and not every one.
    crosses = has_others and "decoder" in stack
    wanted = [
        name
        for name in ("mh_adapter", "output_adapter", "cross_adapter")
        if any(config[name] for config in configs) and (name != "cross_adapter" or crosses)
    ]
    if len(locations) >= len(wanted):
        return []
    found = ", ".join(f"{stack}*{location}" for location in locations)
    return [f"{', '.join(wanted)} are {len(wanted)} places a layer, but all there is is {found}"]


def _layer_problems(
    tensors: Mapping[str, Tensor], config: Config, factors: set[float], hidden_size: int | None
) -> list[str]:
    scaling = config["scaling"]
    wanted = {"down_weight", "down_bias", "up_weight", "up_bias"}
    wanted |= {"scaling"} if isinstance(scaling, str) else set()
    problems = [f"{name} is missing" for name in sorted(wanted - set(tensors))]
    problems += [f"{name} is unknown" for name in sorted(set(tensors) - wanted)]
    if problems:
        return problems
    if not factors:
        return ["reduction_factor names neither its number nor a default"]
    size = hidden_size or tensors["up_bias"].numel()
    allowed = {max(1, int(size // factor)) for factor in factors}
    found = tensors["down_bias"].numel()
    if found not in allowed:
        choices = " or ".join(map(str, sorted(allowed)))
        factor = config["reduction_factor"]
        return [f"R is {found}; hidden_size {size} and reduction_factor {factor} give {choices}"]
    shapes = {"down_weight": (found, size), "up_weight": (size, found), "up_bias": (size,)}
    if isinstance(scaling, str):
        shapes["scaling"] = (1,) if scaling == "learned" else (size,)
    return [
        f"{name} is {list(tensors[name].shape)} where {list(shape)} is due"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
