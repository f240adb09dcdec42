"""The norm behind the output in the CUDA backend: the calls that it declines, and its plans.

The forward has a norm in the cluster form alone, whose blocks hold whole rows among them and
exchange the statistics of these. The backward has a kernel of rows before those of the adapter.
"""

import functools

import torch
from torch import Tensor

from adapterkern.backends.base import optional_rows, packed
from adapterkern.backends.cuda import launch_config
from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.launch_config import (
    CLUSTER_SIZES,
    CLUSTER_TOKENS,
    TokenPlan,
    cdiv,
    cluster_sizes,
    clusters,
    slice_length,
)
from adapterkern.results import Outputs, Saved
from adapterkern.spec import AdapterCall, AdapterSpec
from adapterkern.validation import name_of

VECTOR = 8  # elements: rows are copied in 16 bytes
# Of the kernel of rows in csrc/norm_gradients.cu: threads that share a block, and the most.
ROW_THREADS, MOST_ROW_THREADS = 384, 768
# Blocks of this kernel that an SM has registers for; fewer partial sums would leave SMs idle.
ROW_BLOCKS_PER_SM = 2
# The three waits of a cluster for all of its blocks take about as long as so many elements of its
# rows, at the bandwidth that an SM has of HBM. A guess, from 450 ns a wait (traffic.py).
WAITS = 8192


def declined(spec: AdapterSpec, device: Device | None) -> list[str]:
    """Why the kernels do not take the norm of `spec`; device: where it is known."""
    reasons = []
    if spec.compute_dtype.itemsize != 2:
        reasons.append(
            f"a norm behind products in {name_of(spec.compute_dtype)} is not implemented (has: "
            "bfloat16, float16)"
        )
    elif (stream := _stream_dtype(spec)).itemsize != 2:
        reasons.append(
            f"a norm of a sum in {name_of(stream)} is not implemented: the sum has to stay in the "
            "dtype of the products"
        )
    if spec.hidden_size % VECTOR:
        reasons.append(
            f"a norm needs hidden_size in multiples of {VECTOR}, this is {spec.hidden_size}"
        )
    if spec.hidden_size > VECTOR * MOST_ROW_THREADS:
        reasons.append(
            f"a norm of hidden_size {spec.hidden_size} exceeds {VECTOR * MOST_ROW_THREADS}, the "
            "widest row of one block"
        )
    if device is not None and not reasons:
        reasons += _declined_clusters(spec, device)
    return reasons


def _stream_dtype(spec: AdapterSpec) -> torch.dtype:
    """`AdapterCall.output_dtype`."""
    added = {"scaling", "residual", "skip"}
    if "input_residual" in spec.features:
        added.add("x")
    dtypes = [dtype for name, dtype in spec.dtypes if name in added]
    return functools.reduce(torch.promote_types, dtypes, spec.compute_dtype)


def _declined_clusters(spec: AdapterSpec, device: Device) -> list[str]:
    placed = CLUSTER_SIZES if device.cluster_sizes is None else device.cluster_sizes
    if not device.cluster_memory or not placed:
        return [
            "a norm needs clusters of blocks, which this device, or the extension's code for it, "
            "does not have"
        ]
    problem = Problem(1, spec.hidden_size, spec.bottleneck_size, half=True)
    tokens = min(CLUSTER_TOKENS)
    fact = launch_config.facts().cluster(problem, tokens)
    if fact is None:
        widest = max(fact.width for fact in launch_config.facts().clusters)
        return [
            f"a norm behind bottleneck_size {spec.bottleneck_size} exceeds {widest}, the widest of "
            "clusters"
        ]
    if cluster_sizes(problem, device, tokens, norm=True):
        return []
    least = fact.bytes_for(slice_length(spec.hidden_size, max(placed)), norm=True)
    return [
        f"a norm of hidden_size {spec.hidden_size} behind bottleneck_size {spec.bottleneck_size} "
        f"needs {least} bytes of shared memory in each of {max(placed)} blocks, this device has "
        f"{device.cluster_memory}"
    ]


@functools.lru_cache(maxsize=4096)
def norm_plan(problem: Problem, device: Device) -> TokenPlan:
    """The clusters whose busiest block has the least to do, at any number of tokens."""
    plans = [
        clusters(problem, device, size, tokens)
        for tokens in CLUSTER_TOKENS
        for size in cluster_sizes(problem, device, tokens, norm=True)
    ]
    return min(plans, key=lambda plan: _busiest(problem, plan))


def _busiest(problem: Problem, plan: TokenPlan) -> float:
    """The work of the busiest block in elements of the rows; what it exchanges of a token in
    float32 and in half precision are 6 R bytes, and a feature costs 4.
    """
    turns = cdiv(cdiv(problem.num_tokens, plan.cluster_tokens), plan.num_clusters)
    token = plan.slices.length + 1.5 * problem.bottleneck_size
    return turns * (plan.cluster_tokens * token + WAITS)


def row_blocks(num_tokens: int, hidden_size: int, device: Device) -> int:
    """The blocks that share the tokens in the kernel of rows: each writes a row of partial sums."""
    threads = cdiv(hidden_size, 32 * VECTOR) * 32
    rows = max(1, ROW_THREADS // threads)
    return min(ROW_BLOCKS_PER_SM * device.num_sms, cdiv(num_tokens, rows))


def backward_inputs(call: AdapterCall, saved: Saved, upstream: Outputs) -> dict[str, Tensor | None]:
    """What the kernel of rows reads, if there is a norm."""
    if call.norm == "none":
        return dict.fromkeys(("d_normed", "d_stream", "stream", "mean", "rstd", "norm_weight"))
    return {
        "d_normed": whole_rows(upstream.normed, gaps=False),
        "d_stream": whole_rows(upstream.y, gaps=False),
        "stream": whole_rows(saved.stream, gaps=False),
        "mean": saved.mean,
        "rstd": saved.rstd,
        "norm_weight": packed(call.norm_weight),
    }


def whole_rows(tensor: Tensor | None, gaps: bool = True) -> Tensor | None:
    """Rows [T, H] that move in 16 bytes: the tensor itself, or a copy where it is not aligned.

    gaps: whether rows may lie apart.
    """
    flat = optional_rows(tensor)
    if flat is None:
        return None
    aligned = flat.data_ptr() % 16 == flat.stride(0) * flat.itemsize % 16 == 0
    if aligned and (gaps or flat.is_contiguous()):
        return flat
    return flat.clone(memory_format=torch.contiguous_format)
