"""What the norms of transformers compute: told by their class and its source, never by values."""

from typing import Any, NamedTuple

from torch import nn

from adapterkern.integrations.transformers.sources import recognised, source_hash
from adapterkern.modules import adapter_norm


class Kind(NamedTuple):
    """A class of norms."""

    norm: str  # "layer" | "rms"
    eps: str  # the attribute that holds it
    weight_offset: float = 0.0
    cast_before_weight: bool = False


KINDS = {
    "llama_norm": Kind("rms", "variance_epsilon", cast_before_weight=True),
    "gemma_norm": Kind("rms", "eps", weight_offset=1.0),
    "helium_norm": Kind("rms", "variance_epsilon"),
    "deberta_norm": Kind("layer", "variance_epsilon", cast_before_weight=True),
}


def kind_of(norm: nn.Module) -> Kind | None:
    """The kind of a norm of transformers; None for one of torch, which describes itself.

    Raises:
        TypeError: it is neither; the message says why.
    """
    kind: Any = type(norm)
    found = KINDS.get(recognised(kind) or "")
    if found is None and kind not in (nn.LayerNorm, nn.RMSNorm):
        subclass = "a subclass of " if isinstance(norm, nn.LayerNorm | nn.RMSNorm) else ""
        what = f"{subclass}{kind.__mro__[1].__name__} and " if subclass else ""
        raise TypeError(
            f"its norm {kind.__name__} is {what}of an unknown source ({source_hash(kind)})"
        )
    return found


def describe(norm: Any, kind: Kind | None) -> adapter_norm.Norm:
    """A norm of this kind as a call takes it."""
    if kind is None:
        return adapter_norm.describe(norm)
    return adapter_norm.Norm(
        norm.weight, getattr(norm, "bias", None), kind.norm, getattr(norm, kind.eps),
        kind.weight_offset, kind.cast_before_weight,
    )  # fmt: skip
