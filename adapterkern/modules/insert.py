"""`insert` and `insert_banks`: adapters into any model, behind modules that are named."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adapterkern.modules.adapter_bank import AdapterBank
from adapterkern.modules.adapter_banks import AdapterBanks, Route
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.deferral import is_deferred
from adapterkern.validation import FLOAT_DTYPES

M = TypeVar("M", BottleneckAdapter, AdapterBank)
_NO_OPTIONS = {  # of insert_banks
    "residual": "what a module computed is always added to what its bank gives",
    "bottleneck_size": "max_bottleneck_size; banks.add(name, bottleneck_size=...) has its own",
    "reduction_factor": "max_bottleneck_size; banks.add(name, reduction_factor=...) has its own",
}


def insert(
    model: nn.Module,
    after: str | Iterable[str],
    *,
    hidden_size: int | None = None,
    name: str = "adapter",
    freeze: bool = True,
    **options: Any,
) -> dict[str, BottleneckAdapter]:
    """Put an adapter behind every module of a model that is named, and freeze the rest.

    From then on a module that computed h gives h + scaling * up(act(down(h))). The adapter is its
    submodule `name`, called by a forward hook: classes, calls and the keys of the model's own
    weights stay as they are, and deepcopy, pickle, torch.compile and state dicts know the adapters.
    Where a module returns a tuple, its first element is adapted.

        adapters = ak.insert(model, after=["attention.output.dense", "mlp.fc2"], bottleneck_size=48)
        torch.save({key: a.state_dict() for key, a in adapters.items()}, "adapters.pt")

    Args:
        model: any model; nothing of it is called.
        after: names of modules as `model.named_modules()` has them, or their ends at a dot:
            "fc2" is every module of that name. "" is the model itself.
        hidden_size: H of the outputs; None: the size of a linear layer's or a LayerNorm's output.
        name: of the submodule; another name puts a second adapter behind the first.
        freeze: whether `requires_grad` of every parameter that is there before becomes False.
        options: further arguments of `BottleneckAdapter`. Device and dtype are those of the
            module's first floating-point parameter where none is given.

    Returns:
        The adapters by their names in the model.

    Raises:
        TypeError: `model` is no nn.Module, or a name of `after` no string.
        ValueError: `name` cannot name a submodule, a name of `after` fits no module, a module
            cannot take an adapter, or as `BottleneckAdapter`. The model is then as it was.
    """
    hook = partial(_adapt_output, name)
    made = _put(BottleneckAdapter, model, after, hidden_size, name, freeze, options, hook)
    return {f"{path}.{name}" if path else name: adapter for path, adapter in made.items()}


def insert_banks(
    model: nn.Module,
    after: str | Iterable[str],
    *,
    hidden_size: int | None = None,
    name: str = "bank",
    freeze: bool = True,
    **options: Any,
) -> AdapterBanks:
    """Put a bank of adapters behind every module of a model that is named, and freeze the rest.

    From then on each sequence of a batch takes the adapter that `route` names for it, in all of
    these places, in one call at each:

        banks = ak.insert_banks(model, after=["attention.output.dense", "mlp.fc2"], slots=8)
        banks.add("fr", bottleneck_size=48)
        banks.add("de", adapters_in("de_folder"))  # of adapterkern.integrations.peft
        banks.route(["fr", None, "de"])
        y = model(batch_of_three)

    Each bank is the submodule `name` of the module that it follows, called by a forward hook, as
    `insert` puts adapters. Until something is routed, the model computes what it did before.

    Args:
        model, after, hidden_size, name, freeze: as in `insert`.
        options: further arguments of `AdapterBank`, as max_bottleneck_size, slots and activation.

    Returns:
        The banks by the names of the modules that they follow, with `add`, `remove` and `route`.

    Raises:
        TypeError, ValueError: as `insert` and `AdapterBank`, without its residual: what a module
            computed is always added. The model is then as it was.
    """
    for option, hint in _NO_OPTIONS.items():
        if option in options:
            raise TypeError(f"insert_banks takes no {option}.\n  hint: {hint}")
    route = Route()
    hook = partial(_route_output, name, route)
    made = _put(AdapterBank, model, after, hidden_size, name, freeze, options, hook)
    return AdapterBanks(made, route)


def _put(
    kind: type[M], model: nn.Module, after: str | Iterable[str], hidden_size: int | None, name: str,
    freeze: bool, options: dict[str, Any], hook: Callable,
) -> dict[str, M]:  # fmt: skip
    """A submodule of this kind and name at each place, for the hook to call."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name must be that of a submodule, a string without dots, got {name!r}.")
    targets = _targets(model, [after] if isinstance(after, str) else list(after))
    for path, module in targets.items():
        _check_place(model, path, module, name)
    made: dict[str, M] = {}
    for path, module in targets.items():
        size = hidden_size if hidden_size is not None else _output_size(path, module)
        made[path] = kind(size, **_like(module) | options)
    if freeze:
        model.requires_grad_(False)
    for path, adapters in made.items():
        targets[path].add_module(name, adapters.train(targets[path].training))
        targets[path].register_forward_hook(hook)
    return made


# At module level, and finding the adapter by name, so that copies of a model call their own.
def _adapt_output(name: str, module: nn.Module, _: Any, output: Any) -> Any:
    adapter = getattr(module, name)
    return output if is_deferred(adapter) else _with_first(module, output, adapter)


def _route_output(name: str, route: Route, module: nn.Module, _: Any, output: Any) -> Any:
    if route.is_base():
        return output
    return _with_first(module, output, partial(route.run, getattr(module, name)))


def _with_first(module: nn.Module, output: Any, adapt: Callable[[Tensor], Tensor]) -> Any:
    """What a module returns with its hidden states, the first of a tuple, adapted."""
    if isinstance(output, Tensor):
        return adapt(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)((adapt(output[0]), *output[1:]))
    raise TypeError(
        f"an adapter follows {type(module).__name__}, whose output must be a tensor or a tuple "
        f"that begins with one, got {type(output).__name__}.\n"
        "  hint: put the adapter behind a layer within it"
    )


def inserted_adapters(module: nn.Module) -> list[BottleneckAdapter]:
    """The adapters that `insert` has put behind a module, in the order of their calls."""
    hooks = [
        hook
        for hook in module._forward_hooks.values()
        if isinstance(hook, partial) and hook.func is _adapt_output
    ]
    return [getattr(module, hook.args[0]) for hook in hooks]


def _targets(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules that the names fit, in the order of the model; adapters and their parts aside."""
    for given in names:
        if not isinstance(given, str):
            raise TypeError(f"after must be names of modules, got {given!r}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = BottleneckAdapter, AdapterBank
    adapters = tuple(p for p, m in modules.items() if isinstance(m, kinds))
    own = [p for p in modules if any(p == a or p.startswith(f"{a}.") for a in adapters)]
    paths = [path for path in modules if path not in own]
    fits = {given: [p for p in paths if p == given or p.endswith(f".{given}")] for given in names}
    fits |= {given: [""] for given in names if not given}
    unknown = [repr(given) for given, found in fits.items() if not found]
    if unknown or not names:
        there = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) for path in paths if path)
        raise ValueError(
            f"after must name modules of the model, and {', '.join(unknown) or 'no name'} fits "
            f"none.\n  hint: its modules are {', '.join(there)}"
        )
    wanted = {path for found in fits.values() for path in found}
    unique = {id(modules[path]): path for path in reversed(paths) if path in wanted}
    return {path: modules[path] for path in paths if path in unique.values()}


def _check_place(model: nn.Module, path: str, module: nn.Module, name: str) -> None:
    """Refuse a module that would not call its adapter, or whose place for it is taken."""
    parent = model.get_submodule(path.rpartition(".")[0])
    where = f"cannot put an adapter behind {path or 'the model'}: "
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise ValueError(
            f"{where}a {type(module).__name__} is never called.\n  hint: name its parts"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{where}nn.MultiheadAttention reads its weights and never calls it.\n"
            "  hint: name the attention itself; the first of what it returns is adapted"
        )
    if hasattr(module, name):
        raise ValueError(
            f"{where}it has {name!r} already.\n"
            '  hint: another name puts a second one behind it, as in name="second_adapter"'
        )


def _output_size(path: str, module: nn.Module) -> int:
    for attribute in ("out_features", "nf", "normalized_shape", "embedding_dim", "embed_dim"):
        size = getattr(module, attribute, None)
        size = size[-1] if isinstance(size, tuple | torch.Size) and size else size
        if isinstance(size, int) and size > 0:
            return size
    raise ValueError(
        f"nothing in {path or 'the model'}, a {type(module).__name__}, tells the size of its "
        "output.\n  hint: hidden_size=... does"
    )


def _like(module: nn.Module) -> dict[str, Any]:
    """Device and dtype of a module, as far as it has them."""
    parameters = list(module.parameters())
    for parameter in parameters:
        if parameter.dtype in FLOAT_DTYPES:
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {"device": parameters[0].device} if parameters else {}
