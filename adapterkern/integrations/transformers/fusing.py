"""fuse_norms, unfuse_norms and explain: which sites of a model run as one pass."""

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from adapterkern.integrations.transformers.blocks import BLOCKS, Record, run
from adapterkern.integrations.transformers.norms import describe, kind_of
from adapterkern.integrations.transformers.sites import (
    Placed,
    Site,
    active_dropout,
    adapter_behind,
    has_own_forward,
    is_wrapped,
    obstacle_at,
    reach,
)
from adapterkern.integrations.transformers.sources import recognised, source_hash
from adapterkern.modules.explain import table
from adapterkern.modules.insert import inserted_adapters

COLUMNS = ("adapter behind", "in one pass with", "state")
FUSED, UNFUSED = "fused", "not fused: fuse_norms does it"


@dataclass(frozen=True)
class Row:
    """One adapted layer of a model."""

    layer: str  # its name in the model
    follows: str  # what follows its adapter: "add", or "add" and the class of a norm
    reason: str  # why its adapter does not run in one pass with that; "" where it does

    @property
    def fused(self) -> bool:
        """Whether the next call runs all of it in one pass."""
        return not self.reason


@dataclass(frozen=True)
class Report:
    """Every adapted layer of a model, as `fuse_norms` and `explain` return it."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no adapted layers"
        fused = sum(row.fused for row in self.rows)
        head = f"{fused} of {len(self.rows)} adapted layers run in one pass with what follows them"
        cells = [(row.layer, row.follows, row.reason or FUSED) for row in self.rows]
        return "\n".join([head, *table(COLUMNS, cells)])


def fuse_norms(model: nn.Module) -> Report:
    """Let blocks of transformers run adapter, residual add and norm in one pass over memory.

    The forward of each block that is known is replaced, on the instance: modules, parameters, the
    keys of state dicts and hooks stay where they are, and so do saving, copies, PEFT's switching of
    adapters, gradient checkpointing and torch.compile. Adapters are those of
    `adapterkern.integrations.peft`, and of `adapterkern.insert` behind linear layers, attentions
    and FFNs.

    - post-LN, both sites (BERT, RoBERTa, ELECTRA, DeBERTa, MPNet, DistilBERT and their copies):
      norm(adapter(h) + residual) is one pass.
    - pre-LN, behind attention (Llama, Mistral, Qwen 2 and 3, Gemma, GPT-2, OPT): the sum and its
      norm are one pass. Behind the FFN, whose norm the next block holds, adapter and add are.

    A call that cannot be one pass runs the model's own code, with a `FallbackWarning` once a reason
    unless no adapter is active: dropout between adapter and add in training, several active
    adapters or one for each input, hooks that would see or miss something. What is added to the
    model later, on other layers, is fused by another call of this function.

    Args:
        model: a model, or a wrapper around it, such as a `peft.PeftModel`.

    Returns:
        What `explain` returns.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: nothing of the model can be fused; all reasons are listed.
    """
    found = _survey(model)
    able = {id(one.block): one for one in found if not one.reason}
    if not able and not any(map(_is_fused, model.modules())):
        raise ValueError(_refusal(found))
    for one in able.values():
        block: Any = one.block
        placed = tuple(_place(block, site) for site in _sites(block, one.kind))
        usable = tuple(place if isinstance(place, Placed) else None for place in placed)
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        defaults = {p.name: p.default for p in named if p.default is not p.empty}
        record = Record(one.kind, tuple(p.name for p in named), defaults, usable)
        block.forward = functools.partial(run, block, record)
        block._replicate_for_data_parallel = functools.partial(_replicate, block, record)
    return explain(model)


def _replicate(block: Any, record: Record) -> Any:
    """A replica of nn.DataParallel, whose copied forward would run the block itself."""
    replica = type(block)._replicate_for_data_parallel(block)
    replica.forward = functools.partial(run, replica, record)
    return replica


def _refusal(found: list["_Found"]) -> str:
    why = table(("adapter behind", "reason"), [(one.name, one.reason) for one in found])
    listing = "\n  ".join(why if found else ["none of its layers has an adapter"])
    return (
        f"nothing of this model can run in one pass with its adapters:\n  {listing}\n"
        "  hint: the docstring of fuse_norms lists the blocks that can; adapters come from "
        "adapterkern.integrations.peft or adapterkern.insert"
    )


def unfuse_norms(model: nn.Module) -> None:
    """Take back what `fuse_norms` did; the blocks have the forwards of their classes again.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: something has wrapped a forward since; the model is then as it was.
    """
    _check(model)
    fused = [module for module in model.modules() if _is_fused(module)]
    wrapped = [name for name, module in model.named_modules() if _is_wrapped(module)]
    if wrapped:
        raise ValueError(
            f"the fused forwards of {', '.join(wrapped)} were wrapped after fuse_norms.\n"
            "  hint: take that back first, as accelerate's remove_hook_from_submodules does"
        )
    for module in fused:
        del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]


def explain(model: nn.Module) -> Report:
    """Which adapters of a model run in one pass with the add and the norm that follow, and why not.

    Nothing runs and nothing changes. It tells of the next call, in the model's present mode: what
    is in training, active or hooked now.
    """
    rows = []
    for one in _survey(model):
        reason = one.reason
        if not reason:
            reason = _present_obstacle(one) if _is_fused(one.block) else UNFUSED
        rows.append(Row(one.name, one.follows, reason))
    return Report(tuple(rows))


class _Found(NamedTuple):
    """An adapted layer, and the block that it belongs to."""

    name: str
    layer: nn.Module
    follows: str
    reason: str  # why it can never be fused as the model stands; "" where it can
    block: Any = None
    kind: str = ""  # of the block
    site: Site | None = None


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")


def _survey(model: nn.Module) -> list[_Found]:
    """Every adapted layer of a model."""
    _check(model)
    modules = dict(model.named_modules())
    owners: dict[int, tuple[Any, str, Site]] = {}
    for module in modules.values():
        kind = recognised(type(module)) or ""
        for site in _sites(module, kind) if kind in BLOCKS else ():
            owners[id(reach(module, site.layer))] = module, kind, site
    found = []
    for name, layer in modules.items():
        if is_wrapped(layer) or not (hasattr(layer, "adapters_to_run") or inserted_adapters(layer)):
            continue
        if id(layer) not in owners:
            around = modules[name.rpartition(".")[0]]
            is_held = id(around) in owners
            reason = f"a {_named(around)} wraps it" if is_held else _unknown(name, modules)
            found.append(_Found(name, layer, "?", reason))
            continue
        block, kind, site = owners[id(layer)]
        norm = None if site.norm is None else type(getattr(block, site.norm)).__name__
        follows = "add" if norm is None else f"add, {norm}"
        placed = _place(block, site)
        reason = placed if isinstance(placed, str) else _beside(layer)
        found.append(_Found(name, layer, follows, reason, block, kind, site))
    return found


def _sites(block: Any, kind: str) -> list[Site]:
    """The sites of a block of this kind, with a part in place of the layer where `insert` has put
    an adapter behind the part, as in after="self_attn"."""
    return [
        site.behind_part() if site.part and inserted_adapters(getattr(block, site.part)) else site
        for site in BLOCKS[kind].sites
    ]


def _place(block: Any, site: Site) -> Placed | str:
    """What is recognised at a site, or why it cannot be fused."""
    layer = reach(block, site.layer)
    if layer is None:
        return f"{type(block).__name__} has no {'.'.join(site.layer)}"
    if is_wrapped(layer):
        return f"a {type(layer).__name__} wraps its layer"
    part = None if site.part is None else getattr(block, site.part)
    norm = None if site.norm is None else getattr(block, site.norm)
    needs = BLOCKS[str(recognised(type(block)))].needs
    if needs is not None and not getattr(block, needs, False):
        return f"{needs} is off: its norms stand elsewhere"
    if part is not None and recognised(type(part)) != "part":
        return f"{_named(part)} has an unknown source"
    modules = (layer, getattr(layer, "base_layer", None), part, norm)
    if any(getattr(module, "_is_hooked", False) for module in modules):
        return "it is tensor-parallel"
    try:
        kind = None if norm is None else kind_of(norm)
        if norm is not None:
            describe(norm, kind)
    except (TypeError, ValueError) as error:
        return str(error)
    if has_own_forward(block) and not _is_fused(block):
        return f"{type(block).__name__} has a forward of its own already"
    placed = Placed(site, kind, (_type_of(part), _type_of(norm)))
    adapter = adapter_behind(layer)
    if isinstance(adapter, str):
        return placed
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.shape != (adapter.hidden_size,):
        return f"the weight of its norm is {list(weight.shape)} here, as sharded ones are"
    return obstacle_at(block, placed, layer, adapter) or placed


def _beside(layer: Any) -> str:
    """The reason where every adapter of a layer reads the FFN's input."""
    adapter = adapter_behind(layer)
    return adapter if isinstance(adapter, str) and "parallel" in adapter else ""


def _present_obstacle(one: _Found) -> str:
    """Why the next call of a fused block leaves this site to the model; "" where it does not."""
    record = one.block.forward.args[1]
    placed = next((p for p in record.placed if p is not None and p.site == one.site), None)
    if placed is None:
        return UNFUSED
    adapter = adapter_behind(one.layer)
    if isinstance(adapter, str):
        return adapter
    obstacle = obstacle_at(one.block, placed, one.layer, adapter)
    return obstacle or active_dropout(one.block, placed.site, adapter) or ""


def _unknown(name: str, modules: dict[str, nn.Module]) -> str:
    """Why no block is known around a layer, with the hashes of what is there."""
    around = []
    while "." in name:
        name = name.rpartition(".")[0]
        if name.rpartition(".")[2].isdigit():
            around.append(modules[name])
            break
        around.append(modules[name])
    for module in around:
        known = recognised(type(module))
        if known == "norm_before_add":
            return f"{type(module).__name__} norms the layer's output before it adds it"
        if known in BLOCKS:
            return f"no norm follows it alone in {type(module).__name__}"
    return f"no block of a known source: {', '.join(map(_named, around)) or 'it is in none'}"


def _named(module: nn.Module) -> str:
    kind: Any = type(module)
    return f"{kind.__name__} ({source_hash(kind)})"


def _type_of(module: nn.Module | None) -> type | None:
    return None if module is None else type(module)


def _fused_forwards(module: nn.Module) -> Iterator[str]:
    for name, value in module.__dict__.items():
        if isinstance(value, functools.partial) and value.func is run:
            yield name


def _is_fused(module: Any) -> bool:
    return "forward" in _fused_forwards(module)


def _is_wrapped(module: nn.Module) -> bool:
    """Whether a fused forward was put elsewhere, as accelerate does to call it itself."""
    return any(name != "forward" for name in _fused_forwards(module)) and not _is_fused(module)
