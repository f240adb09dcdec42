"""The compiled CUDA kernels' use of a GPU, read from the installed extension."""

import importlib.util
import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from adapterkern.backends.cuda import extension

KB, MB = 1024, 1024 * 1024
# Bytes of stack by architecture and kernel, 0 elsewhere. This one runs once over the weights, after
# all that is as long as the tokens.
STACKS = {("sm_80", "bottleneck_bwd_dw_sum_kernel"): 24}
LARGEST_BINARY = 20 * MB
# This leaves out dynamic shared memory, which csrc/row_block.cuh keeps within 99 KB.
MOST_STATIC_SHARED = 0


def cuobjdump(*options: str) -> str:
    spec = importlib.util.find_spec("triton")
    library = importlib.util.find_spec("adapterkern._cuda")
    if spec is None:
        pytest.skip("needs cuobjdump, which comes with triton")
    if library is None:
        pytest.skip(f"needs the extension: {extension.load().problem}")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [str(tool), *options, library.origin], capture_output=True, text=True, check=True
    ).stdout


@cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Map architecture to kernel (mangled) to REG, STACK, SHARED."""
    found: dict = defaultdict(dict)
    arch = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        if "REG:" in line:
            found[arch][name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


@cache
def tensor_instructions(arch: str) -> dict[str, int]:
    """Map kernel (mangled) to its number of HMMA instructions."""
    counts: dict = {}
    for line in cuobjdump("--dump-sass", "--gpu-architecture", arch).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
            counts[name] = 0
        elif "HMMA" in line:
            counts[name] += 1
    return counts


def adapter_kernels(arch: str) -> dict[str, dict[str, int]]:
    kernels = {n: used for n, used in resources()[arch].items() if "bottleneck_" in n}
    # Precisions, tiles, kernels; clusters: dtypes, tiles, tokens, kernels; sums; one for all.
    assert len(kernels) == 4 * 5 * 6 + 2 * 4 * 2 * 2 + 4 * 2 + 1
    return kernels


def archs() -> list[str]:
    return [arch for arch in extension.build_record().archs if arch.startswith("sm_")]


def needs_extension() -> None:
    if not archs():
        pytest.skip(f"needs the extension: {extension.load().problem}")


def test_registers_do_not_spill():
    needs_extension()
    for arch in archs():
        for name, used in adapter_kernels(arch).items():
            kernel = re.search(r"bottleneck_\w+?_kernel", name)[0]
            assert used["STACK"] <= STACKS.get((arch, kernel), 0), (arch, name)


def test_shared_memory_is_all_dynamic():
    """The launch, which knows the device's limit, can then decide over it."""
    needs_extension()
    for arch in archs():
        # Compute capability 9.0 reserves 1 KB a block for the system.
        reserved = KB if arch.startswith("sm_9") else 0
        used = {u["SHARED"] for u in adapter_kernels(arch).values()}
        assert max(used) <= MOST_STATIC_SHARED + reserved, arch


def test_products_run_on_tensor_cores_all_but_full_float32():
    needs_extension()
    for arch in archs():
        counts = {n: c for n, c in tensor_instructions(arch).items() if "bottleneck_" in n}
        fast = {n for n in counts if re.search("__half|__nv_bfloat16|TFloat32", n)}
        assert len(fast) == 3 * (5 * 6 + 2) + 2 * 4 * 2 * 2, arch
        if arch == "sm_80":  # which has no clusters, so that these kernels are empty
            fast = {n for n in fast if "cluster" not in n}
        assert {n for n, count in counts.items() if count} == fast, arch


def test_binary_stays_small():
    needs_extension()
    library = Path(importlib.util.find_spec("adapterkern._cuda").origin)
    assert library.stat().st_size <= LARGEST_BINARY
