"""AdapterHub's `adapters`: one line makes an existing model run its bottleneck adapters fused.

    from adapterkern.integrations import adapterhub
    adapterhub.patch(model)

Only `patch`, `unpatch`, `patched` and `explain` need the library. `load`, `adapters_in` and `save`
read and write its adapter folders, and `from_module` converts single modules, without it.
"""

from typing import TYPE_CHECKING, Any

from adapterkern.errors import FallbackWarning, UnsupportedAdapterError
from adapterkern.integrations.adapterhub.checkpoint import (
    AdapterCheckpoint,
    adapters_in,
    load,
    save,
)
from adapterkern.integrations.adapterhub.conversion import from_module

if TYPE_CHECKING:
    from adapterkern.integrations.adapterhub.patching import explain, patch, patched, unpatch

__all__ = [
    "AdapterCheckpoint",
    "FallbackWarning",
    "UnsupportedAdapterError",
    "adapters_in",
    "explain",
    "from_module",
    "load",
    "patch",
    "patched",
    "save",
    "unpatch",
]

_NEED_THE_LIBRARY = ("explain", "patch", "patched", "unpatch")


def __getattr__(name: str) -> Any:
    if name in _NEED_THE_LIBRARY:
        from adapterkern.integrations.adapterhub import patching

        return getattr(patching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
