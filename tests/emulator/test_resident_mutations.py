"""As test_mutations.py, for the resident form: each planted fault turns a few cases red."""

from dataclasses import replace

import pytest
import torch
from cuda_forms import RESIDENT
from emulated import with_fault
from test_mutations import is_red

from adapterkern.backends.cuda.facts import Problem
from adapterkern.backends.cuda.launch_config import token_plan
from adapterkern.parity import Case

pytestmark = pytest.mark.thorough

# fault: file, text, replacement
FAULTS = {
    "copies and stores read without a fence": (
        "resident.cuh",
        "  fence_async_proxy();\n  warpgroup_fence",
        "  warpgroup_fence",
    ),
    "a slot filled before it is free": ("resident.cuh", "        turn.wait_free();\n", ""),
    "copies that arrive before they land": (
        "resident.cuh",
        "copy_async_arrive(turn.filled())",
        "barrier_arrive(turn.filled())",
    ),
    "rows used before they arrive": ("resident.cuh", "        rows.wait_filled();\n", ""),
    "weight into the bottleneck used before it arrives": (
        "resident.cuh",
        "        weight.wait_filled();\n        multiply_tiles",
        "        multiply_tiles",
    ),
    "weight out of it used before it arrives": (
        "resident.cuh",
        "          weight.wait_filled();\n          multiply_tiles",
        "          multiply_tiles",
    ),
    "bottleneck used before it is complete": (
        "resident.cuh",
        "      bottleneck.wait_filled();\n",
        "",
    ),
    "sums added before all are there": (
        "resident.cuh",
        "    if (first < share) sums.wait_filled();\n",
        "",
    ),
    "a warp without rows waits for sums": (
        "resident.cuh",
        "if (first < share) sums.wait_filled()",
        "sums.wait_filled()",
    ),
    "sums overwritten while they are read": (
        "resident.cuh",
        "        previous.wait_filled();\n",
        "",
    ),
    "bottleneck overwritten while it is read": (
        "resident.cuh",
        "      bottleneck.wait_free();\n",
        "",
    ),
    "rows freed before they are stored": (
        "resident.cuh",
        "          store_output(rows.template tile<Scalar>(), token, first_feature + in_slice);\n"
        "        }\n        rows.free();\n",
        "        }\n        rows.free();\n        if (writes) store_output(\n"
        "            rows.template tile<Scalar>(), token, first_feature + in_slice);\n",
    ),
    "weight freed before what is added is read": (
        "resident.cuh",
        "          finish_output(acc, rows.template tile<Scalar>(), weight, in_slice);\n"
        "          weight.free();",
        "          weight.free();\n"
        "          finish_output(acc, rows.template tile<Scalar>(), weight, in_slice);",
    ),
    "sums of one block left out": (
        "resident.cuh",
        "for (int block = 0; block < size; ++block) {  // in their order",
        "for (int block = 1; block < size; ++block) {  // in their order",
    ),
    "bottleneck kept from one block": (
        "resident.cuh",
        "      for (int block = 0; block < size; ++block) {\n        store_async",
        "      for (int block = 1; block < size; ++block) {\n        store_async",
    ),
    "rows finished by another block": (
        "resident.cuh",
        "owner = row * cluster_size() / kTileSide",
        "owner = 0",
    ),
    "bias of another panel": ("resident.cuh", "values + in_slice + column", "values + column"),
    "wrong swizzle": ("resident_tiles.cuh", "^ row % 8)", "^ row % 4)"),
    "rows that are not the product's taken for others": (
        "resident.cuh",
        "Added{added.count - 1, {added.rows[1], added.rows[1]}} : added",
        "Added{added.count - 1, {added.rows[0], added.rows[1]}} : added",
    ),
}
# Blocks with rows for three tiles, more than their slots; clusters of which the last block has no
# features, and warps that finish no rows, with time to fall behind.
CASES = [
    (
        replace(RESIDENT, num_sms=sms, cluster_sizes=sizes),
        Case(torch.bfloat16, shape=(tokens,), hidden_size=hidden, bottleneck_size=24, skip=True),
    )
    for sms, sizes, tokens, hidden in [
        *((2, (2,), 150, 1544), (4, (4,), 150, 520), (16, (8,), 640, 520))
    ]
]


def test_cases_take_every_size_of_cluster():
    plans = [
        token_plan(
            Problem(*case.shape, case.hidden_size, case.bottleneck_size, True, 2, beside=1), device
        )
        for device, case in CASES
    ]
    assert [(plan.slices.number, plan.resident_clusters) for plan in plans] == [
        *((2, 1), (4, 1), (8, 2))
    ]


def test_resident_cases_are_green_without_a_fault(tmp_path):
    assert not is_red(with_fault(tmp_path, None), CASES)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_resident_form_turns_its_cases_red(tmp_path, fault):
    assert is_red(with_fault(tmp_path, FAULTS[fault]), CASES)
