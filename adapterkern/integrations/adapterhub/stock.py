"""Recognises the installed `adapters` library by the sources of the functions that are used here.

Importing this module needs the library; nothing else of this package does at import.
"""

import hashlib
import inspect
from collections.abc import Callable

HINT = (
    '  hint: pip install "adapters>=1.1,<1.4", or call nothing of this package that patches models'
)

try:
    import adapters
except ImportError as error:
    raise ImportError(
        "adapterkern.integrations.adapterhub patches models of the `adapters` library, which "
        f"cannot be imported: {error}.\n{HINT}"
    ) from error

try:
    from adapters.composition import AdapterCompositionBlock, BatchSplit, Fuse, Parallel, Stack
    from adapters.configuration import ModelAdaptersConfig
    from adapters.context import AdapterSetup, ForwardContext
    from adapters.methods.adapter_layer_base import AdapterLayerBase, ComposableAdapterLayerBase
    from adapters.methods.bottleneck import BottleneckLayer
    from adapters.methods.modeling import Activation_Function_Class as ActivationFunction
    from adapters.methods.modeling import Adapter, ParallelAdapter
except ImportError as error:
    version = getattr(adapters, "__version__", "(no version)")
    raise ImportError(
        f"adapters {version} lacks what adapterkern patches: {error}.\n{HINT}"
    ) from error

__all__ = [
    "ActivationFunction",
    "Adapter",
    "AdapterCompositionBlock",
    "AdapterSetup",
    "BatchSplit",
    "BottleneckLayer",
    "ForwardContext",
    "Fuse",
    "ModelAdaptersConfig",
    "Parallel",
    "ParallelAdapter",
    "Stack",
    "require_known_version",
]

# The first 16 digits of the SHA-256 of each source, in `adapters` 1.1.0, 1.1.1, 1.2.0 and 1.3.0.
_KNOWN_SOURCES: dict[tuple[type, str], tuple[str, ...]] = {
    (BottleneckLayer, "pre_block"): ("ae9158270c9393c9", "b0e2903db50a70d9"),
    (BottleneckLayer, "compose_single"): ("0afa013973598ac0",),
    (BottleneckLayer, "compose_fuse"): ("ba09cfeb04133767", "8041422ade03a542"),
    (BottleneckLayer, "bottleneck_layer_forward"): ("b613ba90c038a515", "dc8f258dcc5dc89a"),
    (Adapter, "pre_forward"): ("b28774c5a7fbe4c6", "42ad30fd48fd59f5"),
    (Adapter, "forward"): ("a5280b847f65bac6",),
    (Adapter, "post_forward"): ("803b65c7323f7ce0",),
    (ParallelAdapter, "pre_forward"): ("ed19a914752a5a51",),
    (ParallelAdapter, "forward"): ("dcb1b95733d7e23f",),
    (ParallelAdapter, "post_forward"): ("7914dc56505cf360",),
    (AdapterLayerBase, "get_active_setup"): ("5ec3b3e7f27778af",),
    (ComposableAdapterLayerBase, "compose"): ("17530b79c27211bb", "7e0ddf8a8433949b"),
    (ComposableAdapterLayerBase, "compose_stack"): ("7c0461c99fbf24ca",),
    (ComposableAdapterLayerBase, "compose_batch_split"): ("e74fa14adc578524",),
    (ComposableAdapterLayerBase, "compose_parallel"): ("f148a3c2db5fa461", "6cb7d7ae03ce8470"),
    (BottleneckLayer, "vslice"): ("59a4fce30a3ae7b7", "d8a755ee5dfef9b8"),
    (BottleneckLayer, "pad_and_concat"): ("3f6ec57e74da8996",),
    (BottleneckLayer, "repeat"): ("bd81140ac4768f64", "b2b6b57244f37efd"),
}


def require_known_version() -> str:
    """The library's version, if its adapter code is that of a version this package was written for.

    Raises:
        ImportError: a function is missing or has an unknown source; all of them are listed.
    """
    problems = [
        f"{owner.__name__}.{name} {problem}"
        for (owner, name), known in _KNOWN_SOURCES.items()
        if (problem := _problem(getattr(owner, name, None), known))
    ]
    version = str(getattr(adapters, "__version__", "(no version)"))
    if problems:
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise ImportError(
            f"adapters {version} is not a version that adapterkern knows (1.1 to 1.3), so nothing "
            f"was patched:{listing}\n{HINT}"
        )
    return version


def _problem(function: Callable | None, known: tuple[str, ...]) -> str | None:
    if function is None:
        return "does not exist"
    found = source_hash(function)
    if found is None:
        return "has no source to compare"
    return None if found in known else f"has an unknown source ({found})"


def source_hash(function: Callable) -> str | None:
    """Hash a function's source without the space around it; None if there is no source."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.strip().encode()).hexdigest()[:16]
