"""Many adapters as a function: one call made, a backend chosen, the op run."""

from typing import Any

import torch
from torch import Tensor

from adapterkern import dispatch
from adapterkern.grouped import ops
from adapterkern.grouped.call import GroupedCall, make_grouped_call
from adapterkern.grouped.routing import AdapterRouting


def grouped_bottleneck_adapter(
    x: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    routing: AdapterRouting,
    down_biases: Tensor | None = None,
    up_biases: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    activation: str = "gelu",
    scalings: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bottleneck adapters of a batch in which each token takes its own, in one launch.

        y[t] = residual[t] + skip[t] + s_i * (act(x[t] D_i^T + b_i) U_i^T + c_i)

    with i the slot of token t, and residual[t] + skip[t] for a token without an adapter.

    Args:
        x: [..., H], T tokens; dtypes and strides as in `bottleneck_adapter`.
        down_weights: D, [S, R, H], one adapter a slot.
        up_weights: U, [S, H, R].
        routing: which slot each token takes, updated for these T tokens.
        down_biases, up_biases: b [S, R] and c [S, H], each optional on its own.
        ranks: [S] int32, the units that each slot has, from 0 (it takes no part) to R; what is
            beyond is not read. R without.
        residual, skip, activation, backend: as in `bottleneck_adapter`.
        scalings: s, [S] float32 (float64 with float64); 1 without.

    Returns:
        [..., H], contiguous, in the dtype of the products, widened by the residual and skip.

    Raises:
        TypeError, ValueError, BackendUnsupportedError: as `bottleneck_adapter`; ValueError also
            where x has another number of tokens than the routing.

    Differentiable in x, residual, skip, the weights, the biases and scalings. Repeated runs give
    the same bits. Kernels give a token the same bits wherever in the batch it is and whatever the
    others are; the reference may not, for the BLAS rounds a row as its place in the product has it.
    Where plain PyTorch operations have to run (functorch, forward-mode AD, differentiated twice,
    exports), each adapter runs on all tokens.

    Source: derivation in docs/math.md (24)-(25); the idea of grouping by adapter: Chen et al. 2023,
    arXiv:2310.18547.
    """
    check_routing(x, routing)
    call = make_grouped_call(
        x, down_weights, up_weights, down_biases, up_biases, residual, skip, scalings, ranks,
        routing.buffers(), activation, False,
    )  # fmt: skip
    return run_call(call, backend)


def check_routing(x: Any, routing: Any) -> None:
    """Refuse a routing that is none, or that is for another number of tokens than x has.

    Raises:
        TypeError, ValueError: as said.
    """
    if not isinstance(routing, AdapterRouting):
        raise TypeError(
            f"routing must be an AdapterRouting, got {type(routing).__name__}.\n"
            "  hint: AdapterRouting(max_tokens, slots).update(bank.ids(names), seq_len=...)."
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}.")
    if x.dim() > 0 and not torch.compiler.is_compiling():
        routing.check_tokens(x.shape[:-1].numel())


def run_call(
    call: GroupedCall, backend: str = "auto", leaves: ops.Leaves = ops.NO_LEAVES
) -> Tensor:
    """Validate, choose a backend, run."""
    decision = dispatch.select(call, backend)
    if decision.plain:
        return ops.plain(call, leaves)
    if call.num_tokens == 0 and not torch.compiler.is_compiling():
        return ops.plain(call, leaves)
    return ops.run(call, decision.backend, leaves)
