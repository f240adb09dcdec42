"""Fused bottleneck adapters for transformers: residual + scaling * up(act(down(x)))."""

__version__ = "0.1.0"

from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.dispatch import available as backends
from adapterkern.dispatch import use_backend
from adapterkern.errors import FallbackWarning, UnsupportedAdapterError
from adapterkern.functional import bottleneck_adapter, bottleneck_adapter_norm
from adapterkern.grouped.functional import grouped_bottleneck_adapter
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.modules.adapter_bank import AdapterBank
from adapterkern.modules.adapter_banks import AdapterBanks
from adapterkern.modules.adapter_norm import AdapterNorm
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.explain import Explanation, ModelExplanation, explain
from adapterkern.modules.insert import insert, insert_banks
from adapterkern.modules.warmup import warmup

__all__ = [
    "AdapterBank",
    "AdapterBanks",
    "AdapterNorm",
    "AdapterRouting",
    "BackendUnsupportedError",
    "BottleneckAdapter",
    "Explanation",
    "FallbackWarning",
    "ModelExplanation",
    "UnsupportedAdapterError",
    "backends",
    "bottleneck_adapter",
    "bottleneck_adapter_norm",
    "explain",
    "grouped_bottleneck_adapter",
    "insert",
    "insert_banks",
    "use_backend",
    "warmup",
]
