"""The suite can fail: each planted fault in the kernels turns a small set of cases red."""

import cuda_emulator
import pytest
import torch
from cuda_forms import CLUSTER_MEMORY
from emulated import emulated, with_fault

from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.launch_config import token_plan
from adapterkern.parity import Case, check_case

pytestmark = pytest.mark.thorough

HALF = torch.bfloat16

# fault: file, text, replacement
CLUSTER_FAULTS = {
    "exchange before the sums of every block are there": (
        "cluster.cuh",
        "    cluster_barrier();     // the sums of every block are there\n",
        "    __syncthreads();\n",
    ),
    "output before the bottleneck is complete": (
        "cluster.cuh",
        "    cluster_barrier();  // the bottleneck is complete\n",
        "    __syncthreads();\n",
    ),
    "rows and sums overwritten while they are read": (
        "cluster.cuh",
        "    __syncthreads();       // and the sums and the other slot are no longer read\n",
        "",
    ),
    "sums of the warps added before they are there": (
        "cluster_tiles.cuh",
        "  __syncthreads();  // the parts of all warps are there\n",
        "",
    ),
    "rows used before they arrive": (
        "cluster.cuh",
        "    copy_async_wait<1>();  // for these rows\n",
        "",
    ),
    "weight used before it arrives": (
        "cluster.cuh",
        "    copy_async_wait<1>();  // for z, and for the weight out, the first time\n",
        "",
    ),
    "no group for z, so a wait for too few": (
        "cluster.cuh",
        "    copy_async_commit();  // even an empty group keeps the count of pending groups\n",
        "",
    ),
    "z of the tokens before": ("cluster.cuh", "load_z(block + clusters);", ""),
    "bias of another feature": (
        "cluster.cuh",
        "policy.features(tiles.bias(), tiles.factor(), feature + column)",
        "policy.features(tiles.bias(), tiles.factor(), column)",
    ),
    "sums of one block left out": (
        "cluster.cuh",
        "load_remote_16(parts[block][0], from, block);",
        "load_remote_16(parts[block][0], from, 0);",
    ),
    "bottleneck kept from one block": (
        "cluster.cuh",
        "for (int block = 0; block < size; ++block) store_remote_16",
        "for (int block = 1; block < size; ++block) store_remote_16",
    ),
    "the same rows finished by every block": (
        "cluster.cuh",
        "first = cluster_rank() * rows",
        "first = 0 * rows",
    ),
}
WEIGHT_FAULTS = {
    "one step of the tokens left out": (
        "weight_gradients.cu",
        "min(first + params.tokens_per_split, params.num_tokens)",
        "min(first + params.tokens_per_split, params.num_tokens) - 1",
    ),
    "tiles overwritten while they are read": (
        "weight_gradients.cu",
        "    __syncthreads();  // this step's tiles are there, those of the step before are free\n",
        "",
    ),
    "wait for one group too few of many": (
        "weight_gradients.cu",
        "copy_async_wait<kManyStages - 2>",
        "copy_async_wait<kManyStages - 1>",
    ),
    "wait for one group too few of few": (
        "weight_gradients.cu",
        "copy_async_wait<kFewStages - 2>",
        "copy_async_wait<kFewStages - 1>",
    ),
    "no empty group past the end": (
        "weight_gradients.cu",
        "    copy_async_commit();  // an empty group keeps the count of pending groups\n",
        "    if (to_load > 0) copy_async_commit();\n",
    ),
    "loads into the stage in use": ("weight_gradients.cu", "    free = stage;\n", ""),
    "row mask of a step off by one": (
        "gradient_tiles.cuh",
        "row + i * kRowsApart < rows_left ? bytes : 0",
        "row + i * kRowsApart <= rows_left ? bytes : 0",
    ),
    "row mask of a converted step off by one": (
        "gradient_tiles.cuh",
        "if (at >= matrix.rows",
        "if (at > matrix.rows",
    ),
    "wrong lane map of the units": (
        "gradient_tiles.cuh",
        "a + (k + 8 * high + in_matrix) * Shape::kStrideU + 16 * i + 8 * low",
        "a + (k + 8 * low + in_matrix) * Shape::kStrideU + 16 * i + 8 * high",
    ),
    "wrong lane map of the features": (
        "gradient_tiles.cuh",
        "b + (k + 8 * low + in_matrix) * Shape::kStrideF + 8 * (tile + high)",
        "b + (k + 8 * high + in_matrix) * Shape::kStrideF + 8 * (tile + low)",
    ),
    "ones that are not one": (
        "gradient_tiles.cuh",
        "0x3C003C00 : 0x3F803F80",
        "0x3C003C00 : 0x3F813F81",
    ),
    "converted tile stored before its products": (
        "weight_gradients.cu",
        "    finish(free);\n",
        "",
    ),
    "sums of a slice left out": (
        "weight_gradients.cu",
        "if (slice < left)",
        "if (slice + 1 < left)",
    ),
    "gradients read before they are transposed": (
        "weight_gradients.cu",
        "tile[line * kSumStride + quad + i] = g[i];\n  __syncthreads();\n",
        "tile[line * kSumStride + quad + i] = g[i];\n",
    ),
}
FAULTS = {
    "pipeline without its barrier": (
        "tiles.cuh",
        "copy_async_wait_for(stages - 2);\n      __syncthreads();",
        "copy_async_wait_for(stages - 2);",
    ),
    "pipeline without its wait": ("tiles.cuh", "      copy_async_wait_for(stages - 2);\n", ""),
    "wait for one group too few": (
        "tiles.cuh",
        "copy_async_wait_for(stages - 2)",
        "copy_async_wait_for(stages - 1)",
    ),
    "a slot of the pipeline left out": (
        "tiles.cuh",
        "if (++slot == stages) slot = 0;",
        "if (++slot == stages) slot = stages > 2;",
    ),
    "row mask off by one": ("tiles.cuh", "row < rows ? bytes : 0", "row <= rows ? bytes : 0"),
    "tile not filled up with zeros across": (
        "tiles.cuh",
        "columns > 0 ? static_cast<int>(columns * sizeof(Scalar)) : 0",
        "columns > -kColumns ? 16 : 0",
    ),
    "wrong lane map of a": (
        "products.cuh",
        "a + (8 * low + in_matrix) * stride_a + k + 8 * high",
        "a + (8 * high + in_matrix) * stride_a + k + 8 * low",
    ),
    "wrong lane map of b": (
        "products.cuh",
        "b + (8 * (tile + high) + in_matrix) * stride_b + k + 8 * low",
        "b + (8 * (tile + low) + in_matrix) * stride_b + k + 8 * high",
    ),
    "sums written while tiles are read": (
        "row_block.cuh",
        "  __syncthreads();  // the sums take the place of tiles that other warps may still read\n",
        "",
    ),
    "tiles written while the sums are read": (
        "adapter_kernels.cuh",
        "    __syncthreads();  // the sums are read, so that tiles can take their place\n",
        "",
    ),
    "z read before it is there": (
        "adapter_kernels.cuh",
        "        copy_async_wait_for(pending);\n        __syncthreads();  // z is there\n",
        "",
    ),
    "output read before other lanes wrote it": (
        "products.cuh",
        "room_stride(kChunk), acc, first / 8);\n    __syncwarp();\n",
        "room_stride(kChunk), acc, first / 8);\n",
    ),
    "next chunk written while the last is read": (
        "products.cuh",
        "    __syncwarp();  // before the next chunk overwrites what other lanes read here\n",
        "",
    ),
    "rows of another step added": (
        "row_block.cuh",
        "added.rows[i], first_token, feature);",
        "added.rows[i], first_token, first);",
    ),
    "factor of another step": (
        "row_block.cuh",
        "copy(stage.factor(), policy.factor(), kThreads / 2);",
        "copy(stage.factor(), policy.bias(), kThreads / 2);",
    ),
    "second of the added tiles in the place of the first": (
        "row_block.cuh",
        "        tile += kAddedBytes<Shape, std::remove_pointer_t<decltype(type)>>;\n",
        "",
    ),
    "one slice of H left out": (
        "adapter_kernels.cuh",
        "exists ? params.num_splits : 0",
        "exists ? params.num_splits - 1 : 0",
    ),
    "one slice of the output left out": (
        "adapter_kernels.cuh",
        "Policy, Shape>, params.output_splits)",
        "Policy, Shape>, params.output_splits - 1)",
    ),
    "padded units not cleared": (
        "forward_policy.cuh",
        "  clear_padded_units(z, unit, units);\n",
        "",
    ),
    "derivative of the wrong sign": ("activations.cuh", "+ z * expf(-0.5f", "- z * expf(-0.5f"),
}
CASES = [
    # A device, and a problem that takes each form on it, with every tile partly filled. The first
    # takes six steps through five stages: the sums take the place of the tile that is read last.
    (Device(1), Case(dtype=torch.bfloat16, shape=(70,), hidden_size=376, bottleneck_size=24)),
    (
        Device(64),
        Case(
            torch.bfloat16,
            shape=(5,),
            hidden_size=536,
            bottleneck_size=24,
            scaling="channel",
            skip=True,
        ),
    ),
    (
        Device(1),
        Case(torch.bfloat16, "tanh", (70,), hidden_size=200, bottleneck_size=24, nonfinite=True),
    ),
]
# More steps than stages, few and many; tiles that are copied, tiles that are converted from rows at
# odd addresses, and from float32.
WEIGHT_CASES = [
    (
        Device(8, memory=CLUSTER_MEMORY),
        Case(dtype=HALF, shape=(530,), hidden_size=264, bottleneck_size=20),
    ),
    (Device(1), Case(dtype=HALF, shape=(250,), hidden_size=72, bottleneck_size=20)),
    (Device(1), Case(dtype=HALF, shape=(250,), hidden_size=75, bottleneck_size=20)),
    (
        Device(1),
        Case(torch.float32, shape=(150,), hidden_size=72, bottleneck_size=20, autocast=HALF),
    ),
]
CLUSTER_CASES = [
    (
        Device(1, CLUSTER_MEMORY),
        Case(dtype=torch.bfloat16, shape=(150,), hidden_size=264, bottleneck_size=24),
    ),
    (
        Device(14, CLUSTER_MEMORY),
        Case(dtype=torch.bfloat16, shape=(37,), hidden_size=536, bottleneck_size=24),
    ),
]


def test_cluster_cases_take_both_cluster_shapes():
    problems = [
        Problem(*case.shape, case.hidden_size, case.bottleneck_size, half=True)
        for _, case in CLUSTER_CASES
    ]
    plans = [token_plan(p, device) for p, (device, _) in zip(problems, CLUSTER_CASES, strict=True)]
    assert [plan.cluster_tokens for plan in plans] == [64, 16]


def is_red(kernels: cuda_emulator.Emulator, cases: list) -> bool:
    for device, case in cases:
        for seed in (0, 1, 2, 3, 5, 7):  # some races take a certain order of the warps
            kernels.seed = seed
            with emulated(kernels, device):
                try:
                    if not all(row.passed for row in check_case(case, "cuda")):
                        return True
                except RuntimeError:  # the emulator saw it itself
                    return True
    return False


def test_cases_are_green_without_a_fault(tmp_path):
    assert not is_red(with_fault(tmp_path, None), CASES + WEIGHT_CASES + CLUSTER_CASES)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_turns_the_cases_red(tmp_path, fault):
    assert is_red(with_fault(tmp_path, FAULTS[fault]), CASES)


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_fault_in_the_weight_gradients_turns_their_cases_red(tmp_path, fault):
    assert is_red(with_fault(tmp_path, WEIGHT_FAULTS[fault]), WEIGHT_CASES)


@pytest.mark.parametrize("fault", CLUSTER_FAULTS)
def test_fault_in_the_cluster_form_turns_its_cases_red(tmp_path, fault):
    assert is_red(with_fault(tmp_path, CLUSTER_FAULTS[fault]), CLUSTER_CASES)
