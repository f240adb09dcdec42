"""As test_mutations.py, for many adapters: each planted fault turns a small set of cases red."""

import cuda_emulator
import pytest
from cuda_grouped import ROWS, TILES, GroupedCase, GroupedEmulator, backend, build, missed

pytestmark = pytest.mark.thorough

# fault: file, text, replacement
FAULTS = {
    "the rows of another place": (
        "tiles.cuh",
        "matrix.row_of(first_row + first + i * kRowsApart)",
        "matrix.row_of(first_row + first)",
    ),
    "z in the order of the tile": ("grouped_forward.cu", "z.row_of(place)", "place"),
    "the weights of the first slot": (
        "grouped_forward.cu",
        "slot * slot_stride *",
        "0 * slot_stride *",
    ),
    "units beyond the rank": (
        "grouped_forward.cu",
        "rank = min(rank, int64_t{indices(params.ranks)[slot]});",
        "rank = indices(params.ranks)[slot] > 0 ? rank : 0;",
    ),
    "the bottleneck read before it is there": (
        "grouped_forward.cu",
        "  __syncthreads();  // the bottleneck is complete\n",
        "",
    ),
    "one slice of H left out": ("grouped_forward.cu", "split < splits;", "split + 1 < splits;"),
}
CASES = [(TILES, GroupedCase(tokens=70, hidden=200)), (ROWS, GroupedCase(tokens=5, hidden=264))]


def narrowed(folder, fault: str | None = None) -> GroupedEmulator:
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    changes = cuda_emulator.narrowed("__nv_bfloat16")
    if fault is not None:
        file, text, replacement = FAULTS[fault]
        changes[file] = [(text, replacement)]
    return build(folder, changes=changes)


def is_red(kernels: GroupedEmulator) -> bool:
    for device, case in CASES:
        for kernels.seed in (0, 1, 2, 3, 5, 7):  # some races take a certain order of the warps
            try:
                if missed(case.draw(), backend(kernels, device)):
                    return True
            except RuntimeError:  # the emulator saw it itself
                return True
    return False


def test_grouped_cases_are_green_without_a_fault(tmp_path):
    assert not is_red(narrowed(tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_many_adapters_turns_their_cases_red(tmp_path, fault):
    assert is_red(narrowed(tmp_path, fault))
