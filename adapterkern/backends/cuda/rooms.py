"""Work space of the CUDA kernels."""

from typing import Any

import torch
from torch import Tensor

from adapterkern.backends.cuda.launch_config import TokenPlan
from adapterkern.backends.cuda.params import DTYPES, NOTHING
from adapterkern.results import Needs
from adapterkern.spec import AdapterCall


def _whole(size: int) -> int:
    """`size`, rounded up to whole vectors of eight elements."""
    return -(-size // 8) * 8


def partial(plan: TokenPlan, call: AdapterCall, num_tokens: int) -> Tensor | None:
    """Work space of the split form, [S, T, R] with R filled up to the width of a tile."""
    if plan.output_slices.number == 0:
        return None
    shape = plan.slices.number, num_tokens, plan.width
    return torch.empty(shape, dtype=torch.float32, device=call.x.device)


def column_sums(call: AdapterCall, count: int) -> Tensor:
    """Work space [count, H] of a parameter of the norm."""
    return call.x.new_empty(count, call.hidden_size, dtype=torch.float32)


def sums(call: AdapterCall, needs: Needs, count: int) -> tuple[Tensor, dict[str, Any]]:
    """Work space in one piece: for dW_down and G^T [S, R, H], and the column sums of dz [S, R] and
    dy [S, H]. Rows are filled up to whole tiles of eight, so that sums are stored in vectors.

    d(scaling) needs G and the sums of dy even where dW_up and db_up are not asked for.
    """
    bottleneck, hidden = call.bottleneck_size, _whole(call.hidden_size)
    up_bias = needs.up_bias or (needs.scaling and call.up_bias is not None)
    wanted = (
        ("sum_down", needs.down_weight, bottleneck, hidden),
        ("sum_up", needs.up_weight or needs.scaling, bottleneck, hidden),
        ("sum_down_bias", needs.down_bias, 1, _whole(bottleneck)),
        ("sum_up_bias", up_bias, 1, hidden),
    )
    offsets, size = {}, 0
    for name, want, height, width in wanted:
        if want:
            offsets[name] = size
            size += count * height * width
    room = torch.empty(size, dtype=torch.float32, device=call.x.device)
    address, code = room.data_ptr(), DTYPES[torch.float32]
    views = {
        name: (address + 4 * offsets[name], code, width) if name in offsets else NOTHING
        for name, _, _, width in wanted
    }
    return room, views
