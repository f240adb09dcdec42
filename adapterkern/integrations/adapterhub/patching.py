"""patch, unpatch, patched and explain: which models of the library run fused."""

import contextlib
import gc
import re
import threading
import uuid
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adapterkern import _torch
from adapterkern.backends import NAMES
from adapterkern.errors import FallbackWarning, UnsupportedAdapterError
from adapterkern.integrations.adapterhub import fast_path, mixed
from adapterkern.integrations.adapterhub.block_norms import norm_behind
from adapterkern.integrations.adapterhub.coverage import (
    LIBRARY,
    Report,
    Row,
    shown_activation,
    sizes_of,
)
from adapterkern.integrations.adapterhub.eligibility import norm_parts_of, parts_of, with_norm_of
from adapterkern.integrations.adapterhub.fast_path import ADAPTER, FLAG, LAYER, OFF
from adapterkern.integrations.adapterhub.reasons import REASONS, SAME_PASS
from adapterkern.integrations.adapterhub.stock import (
    AdapterCompositionBlock,
    AdapterSetup,
    BottleneckLayer,
    Fuse,
    ModelAdaptersConfig,
    Stack,
    require_known_version,
)
from adapterkern.modules import explain as explaining
from adapterkern.spec import make_call

_METHODS = {
    name: (getattr(BottleneckLayer, name), getattr(module, name))
    for module, names in (
        (fast_path, ("bottleneck_layer_forward", "compose_single", "compose_fuse")),
        (mixed, ("compose_parallel", "compose_batch_split")),
    )
    for name in names
}
_INHERITED = [name for name in _METHODS if name not in vars(BottleneckLayer)]
_ADDED = re.compile("adapter|lora|prefix|prompt|reft")  # in the names of what the library adds
# By id, the configs that `patch` gave a flag.
_flagged: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def patch(
    model: nn.Module | None = None, *, strict: bool = False, layer_level: bool = True
) -> Report:
    """Let a model of the `adapters` library run its bottleneck adapters fused.

    Nothing else of the model changes: classes, parameters, checkpoints and results stay, and
    whatever is added, loaded, stacked or switched later is covered. What cannot run fused keeps the
    library's path: `explain` lists it, and a `FallbackWarning` says so at most once a reason.

    Args:
        model: the model, or a wrapper around it; None: every model of this process, also those to
            come, whatever was said of single ones before.
        strict: raise instead, where an adapter of the model cannot run fused: here for what the
            model has now, at its first call for what is added later, and for every model with None.
        layer_level: also fold the block's own residual into the adapter's pass where one adapter is
            active; False leaves that to the library, for comparisons.

    Returns:
        What `explain(model)` returns; empty for None.

    Raises:
        ImportError: `adapters` is missing or of an unknown version.
        TypeError: not a model.
        ValueError: the model was never given to `adapters.init`.
        UnsupportedAdapterError: `strict` and some adapter stays on the library's path; nothing was
            patched.
    """
    return _patch(model, strict, layer_level, stacklevel=4)


def _patch(model: nn.Module | None, strict: bool, layer_level: bool, stacklevel: int) -> Report:
    level = LAYER if layer_level else ADAPTER
    configs = [] if model is None else configs_of(model)
    with _lock:
        is_first = not is_installed()
        if is_first:
            require_known_version()
        rows = () if model is None else tuple(_rows(model, level=level))
        report = Report(rows, patched=True)
        if strict and report.fallbacks:
            raise UnsupportedAdapterError(_refusal(report))
        _install()
        if model is None:
            fast_path.token, fast_path.default = uuid.uuid4().hex, (level, strict)
        for config in configs:
            setattr(config, FLAG, (fast_path.token, level, strict))
        _flagged.update({id(config): config for config in configs})
    _warn(report, stacklevel)
    if is_first:
        _warn_of_compiled_models(stacklevel)
    return report


def unpatch(model: nn.Module | None = None) -> None:
    """Take `patch` back: for one model, or with None for every model of this process.

    With the last patched model taken out, the library's methods are its own again.

    Raises:
        TypeError: not a model.
        ValueError: the model, or with None any model at all, is not patched.
    """
    with _lock:
        if model is not None:
            configs = configs_of(model)
            if not any(fast_path.level_of(config) for config in configs):
                raise ValueError(
                    f"{type(model).__name__} is not patched.\n"
                    "  hint: adapterhub.patch(model) comes first"
                )
            for config in configs:
                setattr(config, FLAG, (fast_path.token, OFF, False))
            _settle()
        elif not is_installed():
            raise ValueError("no model is patched.\n  hint: adapterhub.patch() comes first")
        else:
            fast_path.token, fast_path.default = uuid.uuid4().hex, (OFF, False)
            _uninstall()


@contextlib.contextmanager
def patched(
    model: nn.Module | None = None, *, strict: bool = False, layer_level: bool = True
) -> Iterator[Report]:
    """`patch` within the block; after it the model is as before, whatever was patched meanwhile.

    With None it is the default of all models that is as before, and what was said of single ones
    before the block holds again; what was said of them within the block ends with it.
    """
    configs = [] if model is None else configs_of(model)
    with _lock:
        token, default = fast_path.token, fast_path.default
        flags = [getattr(config, FLAG, None) for config in configs]
        is_alone = not is_installed()
    try:
        # Through contextlib, so that a warning points at the line of the `with`.
        yield _patch(model, strict, layer_level, stacklevel=5)
    finally:
        with _lock:
            if model is None:
                fast_path.token, fast_path.default = token, default
            for config, flag in zip(configs, flags, strict=True):
                setattr(config, FLAG, flag)
            _settle(among_copies=not is_alone)


def explain(model: nn.Module) -> Report:
    """Every adapter of a model and what runs it in its present mode and setup, patched or not.

    The setup is that of a surrounding `AdapterSetup`, else the model's own.

    Raises:
        ImportError: `adapters` is missing.
        TypeError: not a model.
        ValueError: the model was never given to `adapters.init`.
    """
    levels = [fast_path.level_of(config) for config in configs_of(model)]
    in_part = OFF in levels and any(levels)
    return Report(tuple(_rows(model, in_part)), any(levels))


def configs_of(model: nn.Module) -> list[Any]:
    """The `ModelAdaptersConfig` objects of a model: one, as a rule.

    Raises:
        TypeError: not a model.
        ValueError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    found: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("adapters_config")
        if config is not None:
            found[id(config)] = config
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapters: it was never given to adapters.init.\n"
            "  hint: import adapters; adapters.init(model)"
        )
    return list(found.values())


def is_installed() -> bool:
    """Whether the library's methods are replaced: while a model is patched, or all are."""
    return BottleneckLayer.compose_single is fast_path.compose_single


def _install() -> None:
    for name, (_, ours) in _METHODS.items():
        setattr(BottleneckLayer, name, ours)


def _uninstall() -> None:
    for name, (stock, _) in _METHODS.items():
        setattr(BottleneckLayer, name, stock)
        if name in _INHERITED:
            delattr(BottleneckLayer, name)


def _settle(among_copies: bool = True) -> None:
    """Replace the library's methods if something is patched, and give them back if nothing is."""
    is_known = any(fast_path.level_of(config) for config in _flagged.values())
    if fast_path.default[0] != OFF or is_known or (among_copies and _is_any_patched()):
        _install()
    else:
        _uninstall()


def _is_any_patched() -> bool:
    """Whether a flag says so among all objects there are: copies of models carry their own.

    After gc.freeze() nobody can tell, and the methods, which ask every model's flag, may stay.
    """
    if gc.get_freeze_count() > 0:
        return True
    kinds = {ModelAdaptersConfig, *ModelAdaptersConfig.__subclasses__()}
    return any(type(thing) in kinds and fast_path.level_of(thing) for thing in gc.get_objects())


def _rows(model: nn.Module, in_part: bool = False, level: int | None = None) -> Iterator[Row]:
    """The rows of a report. level: that which the model will have, if not its present one."""
    for name, layer in model.named_modules():
        if not isinstance(layer, BottleneckLayer) or not hasattr(layer, "adapters_config"):
            continue
        context = AdapterSetup.get_context()
        setup = layer.adapters_config.active_setup if context is None else context.adapter_setup
        fused, base_dtype = _under_fuse(setup), _base_dtype(model, name)
        groups = mixed.outlook(layer, setup, base_dtype)
        of_layer = fast_path.level_of(layer.adapters_config) if level is None else level
        for adapter_name, adapter in layer.adapters.items():
            parts = parts_of(adapter)
            if isinstance(parts, str):
                reason, activation = parts, shown_activation(adapter)
            else:
                reason, activation = "", parts[4]
                if adapter_name in fused:
                    reason = "fuse"
                elif not _meets(base_dtype, parts[0]):
                    reason = "dtype"
            if in_part and of_layer == OFF:
                reason = "unpatched"
            runs_on, norm, together = LIBRARY, "", ""
            if not reason:
                behind = norm_behind(model, name, layer) if adapter.original_ln_after else None
                if behind is not None and not _runs_as_layer(
                    adapter_name, adapter, setup, of_layer
                ):
                    behind = "layer_level"
                runs_on, norm = _what_runs(parts, base_dtype, behind)
                together, backend = groups.get(adapter_name, ("", None))
                runs_on = backend or runs_on
            place = name, layer.location_key, adapter_name
            yield Row(*place, *sizes_of(adapter), activation, runs_on, reason, norm, together)


def _runs_as_layer(name: str, adapter: Any, setup: Any, level: int) -> bool:
    """Whether the layer runs as a whole with this adapter, when it is active as the setup has it,
    or alone where the setup does not name it.
    """
    if level == ADAPTER or adapter.residual_before_ln not in (True, False):
        return False
    is_in = isinstance(setup, AdapterCompositionBlock) and name in setup.flatten()
    return not is_in or (type(setup) is Stack and len(setup.children) == 1)


def _what_runs(parts: Any, dtype: torch.dtype | None, behind: Any) -> tuple[str, str]:
    """The backend that runs an adapter with these parts, for hidden states of this dtype, and what
    becomes of the norm `behind` it: `Row.norm`, which `behind` may be itself.
    """
    down, up, down_bias, up_bias, activation, scaling = parts
    x = down.new_empty((1, down.shape[1]), dtype=dtype)
    call = make_call(x, down, up, down_bias, up_bias, activation=activation, scaling=scaling)
    plain = explaining.explain(call).backend
    if behind is None or isinstance(behind, str):
        return plain, behind or ""
    norm_parts = norm_parts_of(behind)
    if isinstance(norm_parts, str):
        return plain, norm_parts
    normed = with_norm_of(call, norm_parts)
    if isinstance(normed, str):
        return plain, normed
    together = explaining.explain(normed).backend
    is_one = together.removesuffix(" (named)") in NAMES  # not "none: ..." or "..., then torch's"
    return (together, SAME_PASS) if is_one else (plain, "no_kernel")


def _meets(base_dtype: torch.dtype | None, weight: torch.Tensor) -> bool:
    """Whether the base model hands this weight its own dtype, or autocast sees to it."""
    same = base_dtype is None or base_dtype == weight.dtype
    return same or torch.is_autocast_enabled(weight.device.type)


def _base_dtype(model: nn.Module, layer: str) -> torch.dtype | None:
    """The dtype of the matrices in the block around a layer, if it is one; norms are wider."""
    while layer:
        layer = layer.rpartition(".")[0]
        dtypes = {
            parameter.dtype
            for name, parameter in model.get_submodule(layer).named_parameters()
            if parameter.dim() >= 2 and parameter.is_floating_point() and not _ADDED.search(name)
        }
        if dtypes:
            return dtypes.pop() if len(dtypes) == 1 else None
    return None


def _under_fuse(setup: Any, inside: bool = False) -> set[str]:
    """The adapters of a setup that an AdapterFusion mixes."""
    if isinstance(setup, str):
        return {setup} if inside else set()
    if not isinstance(setup, AdapterCompositionBlock):
        return set()
    inside = inside or isinstance(setup, Fuse)
    return set().union(*(_under_fuse(child, inside) for child in setup.children))


def _refusal(report: Report) -> str:
    listing = "".join(
        f"\n  - {reason}, {REASONS[reason]}: "
        + ", ".join(f"{row.layer} ({row.adapter})" for row in rows)
        for reason, rows in report.by_reason().items()
    )
    return f"strict=True, and these adapters cannot run fused, so nothing was patched:{listing}"


def _warn(report: Report, stacklevel: int) -> None:
    for reason, rows in report.by_reason().items():
        if reason not in fast_path.warned:
            fast_path.warned.add(reason)
            warnings.warn(
                f"adapterkern: {len(rows)} of {len(report.rows)} adapter layers run on the PyTorch "
                f"path (reason: {reason}, {REASONS[reason]}). See adapterhub.explain(model).",
                FallbackWarning,
                stacklevel=stacklevel,
            )


def _warn_of_compiled_models(stacklevel: int) -> None:
    """The library's own graphs have no guard on the methods that `patch` replaces."""
    if _torch.has_compiled() and "compiled" not in fast_path.warned:
        fast_path.warned.add("compiled")
        warnings.warn(
            "adapterkern: torch.compile ran before this patch, and a model that it compiled then "
            "keeps its graph, which is the library's. Patch first, or call torch.compiler.reset().",
            FallbackWarning,
            stacklevel=stacklevel,
        )
