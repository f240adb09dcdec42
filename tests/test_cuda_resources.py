"""The compiled CUDA kernels' use of a GPU, read from the installed extension."""

import importlib.util
import re
from pathlib import Path

import cuda_sass
import pytest
import sass

KB, MB = 1024, 1024 * 1024
LARGEST_BINARY = 13 * MB
# This leaves out dynamic shared memory, which plans keep within what a device has.
MOST_STATIC_SHARED = 0


def adapter_kernels(arch: str) -> dict[str, dict[str, int]]:
    kernels = {n: used for n, used in cuda_sass.resources()[arch].items() if "bottleneck_" in n}
    # Precisions, tiles, kernels; tiles of a second size: dtypes, tiles, kernels; clusters: dtypes,
    # tiles, tokens, forward, forward with a norm and backward; resident: dtypes, kernels; weight
    # gradients: precisions, tiles, direct or not; their sums; gradients of a norm: dtypes, dtypes
    # of normed; their sums. Of many adapters: dtypes, tiles, in half precision and in float32 and
    # TF32; rows: dtypes, kernels.
    of_one = 4 * 5 * 6 + 2 * 2 * 6 + 2 * 4 * 2 * 3 + 2 * 2 + 4 * 2 * 2 + 1 + 2 * 2 + 1
    assert len(kernels) == of_one + 2 * 3 + 2 * 2 + 3 * 2
    return kernels


def test_registers_do_not_spill():
    for arch in cuda_sass.archs():
        for name, used in adapter_kernels(arch).items():
            assert used["STACK"] == 0, (arch, name)


def test_shared_memory_is_all_dynamic():
    """The launch, which knows the device's limit, can then decide over it."""
    for arch in cuda_sass.archs():
        # Compute capability 9.0 reserves 1 KB a block for the system.
        reserved = KB if arch.startswith("sm_9") else 0
        used = {u["SHARED"] for u in adapter_kernels(arch).values()}
        assert max(used) <= MOST_STATIC_SHARED + reserved, arch


@pytest.mark.parametrize("arch", cuda_sass.ARCHS)
def test_products_run_on_tensor_cores_all_but_full_float32(arch):
    counts = {
        name: sass.count(code, "HMMA", "HGMMA")
        for name, code in cuda_sass.sass(arch).items()
        if cuda_sass.kernel_name(name)
    }
    fast = {n for n in counts if re.search("__half|__nv_bfloat16|TFloat32", n)}
    # The norm has no products, and those of single rows are too thin.
    fast = {n for n in fast if not re.search("bwd_norm|grouped_rows", n)}
    of_many = 2 * 3 + 2
    assert len(fast) == 3 * (5 * 6 + 2 * 2) + 2 * 2 * 6 + 2 * 4 * 2 * 3 + 2 * 2 + of_many
    fast = {n for n in fast if not cuda_sass.is_empty(arch, n)}
    assert {n for n, count in counts.items() if count} == fast


def test_binary_stays_small():
    cuda_sass.archs()  # skips without an extension
    library = Path(importlib.util.find_spec("adapterkern._cuda").origin)
    assert library.stat().st_size <= LARGEST_BINARY
