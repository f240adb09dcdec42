"""The launches of the Triton kernels of a norm, beside those of `launches`."""

import torch
from torch import Tensor

from adapterkern.backends.base import optional_rows, packed, unit_stride
from adapterkern.backends.triton import norm, norm_backward, norm_plan
from adapterkern.backends.triton.activations import VALUES
from adapterkern.backends.triton.launch_config import LaunchConfig, cdiv
from adapterkern.backends.triton.launches import (
    TYPES,
    CallLaunches,
    activations_of,
    channel_of,
    dtypes_of,
    scale_of,
    stride_of,
    tiles_of,
    units_of,
)
from adapterkern.results import Gradients, Outputs, Saved, given_of
from adapterkern.spec import AdapterCall


class NormLaunches(CallLaunches):
    """The launches of one call with a norm."""

    def forward_norm_row_block(
        self, x: Tensor, outputs: Outputs, saved: Saved, config: LaunchConfig, programs: int
    ) -> None:
        call = self._call
        residual, skip = optional_rows(call.residual), optional_rows(call.skip)
        stream, normed = stream_of(outputs), outputs.normed
        self._launch(
            norm.bottleneck_norm_fwd_kernel, (programs,),
            x, packed(call.down_weight), packed(call.up_weight),
            packed(call.down_bias), packed(call.up_bias), residual, skip,
            packed(call.scaling), scale_of(call),
            packed(call.norm_weight), packed(call.norm_bias),
            stream, normed, saved.z, saved.mean, saved.rstd,
            x.shape[0], call.hidden_size, call.bottleneck_size,
            x.stride(0), stride_of(residual), stride_of(skip), unit_stride(call),
            ACTIVATION=VALUES[call.activation], ADD_INPUT=call.add_input,
            OUT_STAGES=self._out_stages(
                config, call.up_weight, stream, x if call.add_input else residual, skip
            ),
            NORM_STAGES=norm_plan.row_stages(config, self._device, stream.element_size()),
            **dtypes_of(call), **channel_of(call), **_norm(call, call.output_dtype), EPS=call.eps,
            **units_of(call), **self._tiles(config, x, call.down_weight),
        )  # fmt: skip

    def norm_rows(self, outputs: Outputs, saved: Saved) -> None:
        """normed of the sum that a kernel without a norm has stored."""
        call, stream = self._call, stream_of(outputs)
        num_tokens, hidden = call.num_tokens, call.hidden_size
        config, _ = norm_plan.rows(num_tokens, hidden, self._device)
        self._launch(
            norm.norm_rows_kernel, (cdiv(num_tokens, config.block_t),),
            stream, packed(call.norm_weight), packed(call.norm_bias),
            outputs.normed, saved.mean, saved.rstd, num_tokens, hidden,
            **_norm(call, call.output_dtype), EPS=call.eps,
            **self._row_tiles(config, stream.element_size()),
        )  # fmt: skip

    def dx_norm_row_block(
        self, saved: Saved, upstream: Outputs, out: Gradients, ds: Tensor,
        dz: Tensor | None, a: Tensor | None, config: LaunchConfig, programs: int,
    ) -> None:  # fmt: skip
        call, z = self._call, saved.z
        stream, d_stream = optional_rows(saved.stream), optional_rows(upstream.y)
        d_normed = optional_rows(upstream.normed)
        assert stream is not None
        assert d_normed is not None
        assert z is not None
        read = [t for t in (d_normed, stream, d_stream) if t is not None]
        sizes = [sum(t.element_size() for t in tensors) for tensors in (read[:2], read)]
        partials = self._partials(out, programs)
        self._launch(
            norm_backward.bottleneck_norm_bwd_dx_kernel, (programs,),
            d_normed, stream, d_stream, packed(call.norm_weight), saved.mean, saved.rstd,
            z, packed(call.down_weight), packed(call.up_weight),
            packed(call.scaling), scale_of(call), ds, out.x, dz, a, *partials,
            ds.shape[0], call.hidden_size, call.bottleneck_size,
            d_normed.stride(0), stream.stride(0), stride_of(d_stream), z.stride(0),
            **activations_of(call), ADD_INPUT=call.add_input,
            NORM_STAGES=norm_plan.row_stages(config, self._device, sizes[0]),
            INTO_STAGES=norm_plan.row_stages(
                config, self._device, sizes[1], call.up_weight.element_size()
            ),
            OUT_STAGES=self._out_stages(
                config, call.down_weight, out.x, ds if call.add_input else None
            ),
            **dtypes_of(call), **channel_of(call), **_norm(call, stream.dtype), **units_of(call),
            **tiles_of(call, config, config.num_stages),
        )  # fmt: skip
        self._sum(partials, out, programs)

    def norm_gradients(
        self, saved: Saved, upstream: Outputs, out: Gradients, ds: Tensor | None
    ) -> None:
        """ds and the gradients of the norm's parameters, of which each may be unasked for."""
        call = self._call
        d_normed = optional_rows(upstream.normed)
        assert d_normed is not None
        reads_stream = ds is not None or out.norm_weight is not None
        stream = optional_rows(saved.stream) if reads_stream else None
        d_stream = optional_rows(upstream.y) if ds is not None else None
        num_tokens, hidden = d_normed.shape
        config, programs = norm_plan.rows(num_tokens, hidden, self._device)
        partials = self._partials(out, programs)
        if partials == (None, None):  # nothing to add up: one row block a program
            programs = cdiv(num_tokens, config.block_t)
        size = sum(t.element_size() for t in (d_normed, stream, d_stream) if t is not None)
        self._launch(
            norm_backward.norm_rows_bwd_kernel, (programs,),
            d_normed, stream, d_stream, packed(call.norm_weight) if ds is not None else None,
            saved.mean if reads_stream else None, saved.rstd if reads_stream else None,
            ds, *partials, num_tokens, hidden,
            d_normed.stride(0), stride_of(stream), stride_of(d_stream),
            **_norm(call, (d_normed if stream is None else stream).dtype),
            **self._row_tiles(config, size),
        )  # fmt: skip
        self._sum(partials, out, programs)

    def _partials(self, out: Gradients, programs: int) -> tuple[Tensor | None, Tensor | None]:
        """Room for each program's sums of the gradients of the norm's parameters."""
        weight, bias = (
            None
            if gradient is None
            else self._own(gradient.new_empty(programs, gradient.shape[0], dtype=torch.float32))
            for gradient in (out.norm_weight, out.norm_bias)
        )
        return weight, bias

    def _sum(
        self, partials: tuple[Tensor | None, Tensor | None], out: Gradients, programs: int
    ) -> None:
        if partials == (None, None):
            return
        config, hidden = norm_plan.SUM, self._call.hidden_size
        self._launch(
            norm_backward.norm_bwd_sum_kernel, (cdiv(hidden, config.block_h),),
            *partials, out.norm_weight, out.norm_bias, hidden, programs,
            BLOCK_S=config.block_t, BLOCK_H=config.block_h,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def _row_tiles(self, config: LaunchConfig, row_bytes: int) -> dict:
        return {
            "EVEN_H": self._call.hidden_size % config.block_h == 0,
            "NORM_STAGES": norm_plan.row_stages(config, self._device, row_bytes),
            "BLOCK_T": config.block_t,
            "BLOCK_H": config.block_h,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }


def stream_of(outputs: Outputs) -> Tensor:
    """Where the sum waits to be normalised: y, or the place of `normed`, whose dtype is as wide."""
    return given_of(outputs) if outputs.y is None else outputs.y


def _norm(call: AdapterCall, stream: torch.dtype) -> dict:
    """Its options, and the dtype of the stream, which a backward reads off that: it does not see
    what was added."""
    return {
        "LAYER": call.norm == "layer",
        "WEIGHT_OFFSET": call.weight_offset,
        "CAST": call.cast_before_weight,
        "STREAM": TYPES[stream],
    }
