"""The backward of many adapters: how its kernels are planned, and which arguments each takes.

Every grid depends on the number of tokens and of slots and on the sizes alone. Few tokens take the
kernels that many do, with shorter row blocks: a step of training is no decoding.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkern.backends.base import (
    empty_grouped_gradients,
    empty_units,
    optional_rows,
    packed,
    unit_rows,
    unit_stride,
)
from adapterkern.backends.triton import grouped_backward as bwd
from adapterkern.backends.triton import grouped_weight_gradients, launcher
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    Split,
    cdiv,
    gradient_stages,
    into_stages,
    out_stages,
    row_blocks,
    split_form,
    weight_gradient_plan,
)
from adapterkern.backends.triton.launches import activations_of, dtypes_of, stride_of, units_of
from adapterkern.grouped.call import TILE, GroupedCall, GroupedGradients, GroupedNeeds, num_tiles

# Of the sum of partial weight gradients. Most slots have few of them.
SUM = LaunchConfig(4, 16, 32, 4, 2)


class Chunks(NamedTuple):
    """How the rows of a routing are cut for the weight gradients."""

    rows: int  # of a chunk
    segments: int  # that chunks and slots can make

    @staticmethod
    def of(problem: Problem, slots: int, kernel: LaunchConfig, device: Device) -> "Chunks":
        """One program an SM where all tokens have one adapter, as the kernel of one has; a chunk of
        under 4 tiles costs more in partial sums than its parallel work gains."""
        programs = cdiv(problem.hidden_size, kernel.block_h)
        programs *= cdiv(problem.bottleneck_size, kernel.block_r)
        wanted = max(1, device.num_sms // programs)
        tiles = max(4, cdiv(cdiv(problem.num_tokens, TILE), wanted))
        return Chunks(tiles * TILE, cdiv(num_tiles(problem.num_tokens, slots), tiles) + slots - 1)


def token_plan(problem: Problem, device: Device) -> LaunchConfig | Split:
    """The row block of dx: the tallest of at most a tile that gives most SMs one, or else the
    shortest; the split form where no block of units holds all of R."""
    blocks = [
        replace(block, block_t=min(block.block_t, TILE))
        for block in row_blocks(problem, device)
        if block.block_r <= 128  # 256 units fit 128 rows, which is more than a tile
    ]
    if not blocks:
        return split_form(problem, device)
    for block in blocks:
        if 4 * cdiv(problem.num_tokens, block.block_t) >= 3 * device.num_sms:
            return block
    return blocks[-1]


class GradientLaunches:
    """The launches of one backward on one device, which `recording` runs and notes."""

    def __init__(
        self, call: GroupedCall, dy: Tensor, recording: launcher.Launches, device: Device
    ) -> None:
        self._call, self._dy, self._device = call, dy, device
        self._launch, self._own = recording.launch, recording.own
        self._rows = num_tiles(self._dy.shape[0], call.slots) * TILE

    def gradients(
        self, z: Tensor | None, needs: GroupedNeeds, tokens: Problem, weights: Problem
    ) -> tuple[GroupedGradients, Tensor | None]:
        """All that are asked for but those of scalings, of which these are the parts [S, H]."""
        call, own = self._call, self._own
        out = empty_grouped_gradients(call, needs._replace(scalings=False))
        for gradient in out:
            own(gradient)
        dz = a = None
        if needs.down_weights or needs.down_biases:
            dz = own(empty_units(call, self._rows))
        if needs.up_weights or needs.scalings:
            a = own(empty_units(call, self._rows))
        if needs.z:
            assert z is not None
            z = unit_rows(call, z)  # hooks on saved tensors may have packed it
            plan = token_plan(tokens, self._device)
            if isinstance(plan, LaunchConfig):
                self._dx(plan, z, out.x, dz, a)
            else:
                if out.x is not None and dz is None:
                    dz = own(empty_units(call, self._rows))
                self._dx(plan.narrow, z, None, dz, a)
                if out.x is not None:
                    self._wide_dx(plan, dz, out.x)
        if needs.parameters:
            return out, self._weight_gradients(dz, a, out, needs, weights)
        return out, None

    def _dx(
        self, config: LaunchConfig, z: Tensor, dx: Tensor | None, dz: Tensor | None,
        a: Tensor | None,
    ) -> None:  # fmt: skip
        call, dy = self._call, self._dy
        stages = into_stages(
            config, self._device, dy.element_size(), call.up_weights.element_size()
        )
        self._launch(
            bwd.grouped_bwd_dx_kernel,
            (self._rows // config.block_t, cdiv(call.bottleneck_size, config.block_r)),
            dy, z, packed(call.down_weights), packed(call.up_weights),
            packed(call.scalings), packed(call.ranks), call.order, call.tiles, dx, dz, a,
            dy.shape[0], call.slots, call.hidden_size, call.bottleneck_size,
            dy.stride(0), unit_stride(call),
            **activations_of(call), ADD_INPUT=call.add_input,
            OUT_STAGES=self._out_stages(config, dx),
            **dtypes_of(call), **units_of(call), **_tiles(call, config, stages),
        )  # fmt: skip

    def _wide_dx(self, plan: Split, dz: Tensor | None, dx: Tensor) -> None:
        call, dy, config = self._call, self._dy, plan.widen
        self._launch(
            bwd.grouped_bwd_wide_dx_kernel,
            (self._rows // config.block_t, cdiv(call.hidden_size, plan.features_per_program)),
            dy, dz, packed(call.down_weights), packed(call.ranks), call.order, call.tiles, dx,
            dy.shape[0], call.slots, call.hidden_size, call.bottleneck_size,
            plan.features_per_program, dy.stride(0), unit_stride(call),
            ADD_INPUT=call.add_input, OUT_STAGES=self._out_stages(config, dx),
            **dtypes_of(call), **units_of(call), **_tiles(call, config, config.num_stages),
        )  # fmt: skip

    def _out_stages(self, config: LaunchConfig, dx: Tensor | None) -> int:
        if dx is None:
            return 1
        row_bytes = self._dy.element_size() if self._call.add_input else 0
        weight_bytes = self._call.down_weights.element_size()
        return out_stages(config, self._device, row_bytes, weight_bytes, dx.element_size())

    def _weight_gradients(
        self, dz: Tensor | None, a: Tensor | None, out: GroupedGradients, needs: GroupedNeeds,
        problem: Problem,
    ) -> Tensor | None:  # fmt: skip
        call, dy, device = self._call, self._dy, self._device
        slots, hidden, bottleneck = call.slots, call.hidden_size, call.bottleneck_size
        config = weight_gradient_plan(problem, device).kernel
        chunks = Chunks.of(problem, slots, config, device)

        def parts(wanted: bool, *shape: int) -> Tensor | None:
            if not wanted:
                return None
            return self._own(dy.new_empty((chunks.segments, *shape), dtype=torch.float32))

        # d(scaling) needs G and sum(dy) even where dW_up and db_up are not asked for.
        has_bias = needs.scalings and call.up_biases is not None
        sums = (
            parts(needs.down_weights, bottleneck, hidden),
            parts(needs.up_weights or needs.scalings, hidden, bottleneck),
            parts(needs.down_biases, bottleneck),
            parts(needs.up_biases or has_bias, hidden),
        )
        found = out.down_weights, out.up_weights, out.down_biases, out.up_biases
        scalings, ranks = packed(call.scalings), packed(call.ranks)
        x, whole = optional_rows(call.x), not needs.scalings
        x_bytes = call.x.element_size() if x is not None else 0
        # A load whose address another load brings is two of the pipeline's steps behind it.
        stages = 2 * gradient_stages(
            config, device, x_bytes + dy.element_size(), 2 * call.compute_dtype.itemsize
        ) - 1  # fmt: skip
        blocks = cdiv(hidden, config.block_h) * chunks.segments, cdiv(bottleneck, config.block_r)
        self._launch(
            grouped_weight_gradients.grouped_bwd_dw_kernel, blocks,
            x, dy, dz, a, scalings, ranks, call.order, call.tiles, call.slot_offsets,
            *sums, *found,
            dy.shape[0], slots, self._rows, hidden, bottleneck, chunks.rows,
            stride_of(x), dy.stride(0), unit_stride(call),
            **dtypes_of(call), WHOLE=whole, **units_of(call), **_tiles(call, config, stages),
        )  # fmt: skip
        d_scaling = None
        if needs.scalings:
            d_scaling = self._own(dy.new_empty((slots, hidden), dtype=torch.float32))
        unit_blocks = 1 if needs.scalings else cdiv(bottleneck, SUM.block_r)
        up_tiles = cdiv(hidden, SUM.block_h) * unit_blocks
        down_tiles = cdiv(bottleneck, 8) * cdiv(hidden, SUM.block_h * SUM.block_r // 8)
        self._launch(
            grouped_weight_gradients.grouped_bwd_dw_sum_kernel,
            (max(up_tiles, down_tiles), 2, slots),
            *sums, packed(call.up_weights), packed(call.up_biases), scalings, ranks,
            call.slot_offsets, *found, d_scaling,
            slots, self._rows, hidden, bottleneck, chunks.rows,
            WHOLE=whole, **units_of(call), BLOCK_S=SUM.block_t,
            BLOCK_H=SUM.block_h, BLOCK_R=SUM.block_r,
            num_warps=SUM.num_warps, num_stages=SUM.num_stages,
        )  # fmt: skip
        return d_scaling


def _tiles(call: GroupedCall, config: LaunchConfig, stages: int) -> dict:
    """The tile of a kernel, and whether it divides H. Ranks end anywhere."""
    return {
        "EVEN_H": call.hidden_size % config.block_h == 0,
        "BLOCK_T": config.block_t,
        "BLOCK_H": config.block_h,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": stages,
    }
