"""What a plan has to know of a call and its tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapterkern.backends.cuda.facts import Problem
from adapterkern.spec import AdapterCall

WHOLE = 8  # elements of 16 bytes in half precision, which copies move


def problem_of(
    call: AdapterCall, num_tokens: int, moved: Mapping[str, Tensor | None], *added: str
) -> Problem:
    """The problem of a call whose kernels copy and write the tensors `moved`, and add those named
    to the output, of which the rows of the product come first if they are among them.
    """
    half = call.compute_dtype != torch.float32
    rows = [t for name in added if (t := moved[name]) is not None]
    tiles = sum(2 if half and t.dtype == torch.float32 else 1 for t in rows)
    # The kernels that read dy scale it on its way in, if each feature has a factor.
    scaled = "dy" in moved and call.scaling is not None and call.scaling.numel() > 1
    whole = half and not scaled and _is_whole(call, moved)
    beside = len(rows) - call.add_input if whole else None
    return Problem(num_tokens, call.hidden_size, call.bottleneck_size, half, tiles, beside)


def _is_whole(call: AdapterCall, moved: Mapping[str, Tensor | None]) -> bool:
    """Whether all of them, and the bottleneck, can be copied 16 bytes at a time as they are."""
    if call.hidden_size % WHOLE or call.bottleneck_size % WHOLE:
        return False
    return all(
        t.dtype == call.compute_dtype
        and t.data_ptr() % 16 == 0
        and (t.dim() < 2 or t.stride(-2) % WHOLE == 0)
        for t in moved.values()
        if t is not None
    )
