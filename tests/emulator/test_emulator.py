"""The emulator reports what a GPU would do wrong without a word, and rounds as a GPU does."""

import ctypes

import cuda_emulator
import pytest
import torch

MISUSES = {
    "misaligned_copy": "copy_async_16: misaligned address in shared memory",
    "misaligned_source": "copy_async_16: misaligned address in global memory",
    "copy_past_the_end": "copy_async_16: outside of the shared memory",
    "misaligned_matrix": "load_matrices: misaligned address in shared memory",
    "matrix_past_the_end": "load_matrices_transposed: outside of the shared memory",
    "store_past_the_end": "a write outside of the shared memory",
    "store_before_the_start": "a write outside of the shared memory",
    "lanes_apart": "lanes of one warp meet in __syncwarp and in load_matrices",
    "half_a_warp": "deadlock",
    "barrier_and_warp": "deadlock",
    "block_and_cluster": "deadlock",
}
WARPGROUP_MISUSES = {
    "barrier_that_was_not_made": "barrier_arrive: no barrier was made here",
    "phase_that_never_ends": "deadlock",
    "bytes_that_never_come": "deadlock",
    "store_async_without_a_cluster": "store_async: the block is the only one of its cluster",
    "copies_not_fenced": "wgmma: reads what was not fenced",
    "sums_not_fenced": "wgmma: its registers are not fenced",
    "operand_without_swizzle": "wgmma: not the swizzle over 128 bytes",
    "operand_across_rows": "wgmma: an operand that leaves its rows",
    "operand_past_the_end": "wgmma: outside of the shared memory",
}
CLUSTER_MISUSES = {
    "remote_past_the_end": "load_remote_16: outside of the shared memory",
    "remote_misaligned": "store_remote_16: misaligned address in shared memory",
    "remote_block_of_another_cluster": "load_remote_16: block 2 is not in the cluster",
    "remote_block_has_ended": "load_remote_16: the other block has ended",
}


@pytest.fixture(scope="module")
def misuse(tmp_path_factory):
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    library = cuda_emulator.build(tmp_path_factory.mktemp("misuse"), "misuse.cu")
    function = ctypes.CDLL(str(library)).run_misuse
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 4]
    data = torch.zeros(64, dtype=torch.uint8)

    def run(name, threads=64, shared_bytes=1024, seed=0, blocks=1) -> str | None:
        message = function(name.encode(), data.data_ptr(), threads, shared_bytes, seed, blocks)
        return message and message.decode()

    return run


@pytest.mark.parametrize("seed", cuda_emulator.SCHEDULES.values(), ids=cuda_emulator.SCHEDULES)
@pytest.mark.parametrize("name", MISUSES)
def test_emulator_reports_misuse_in_every_schedule(misuse, name, seed):
    assert misuse(name, seed=seed).startswith(MISUSES[name])


@pytest.mark.parametrize("seed", cuda_emulator.SCHEDULES.values(), ids=cuda_emulator.SCHEDULES)
@pytest.mark.parametrize("name", WARPGROUP_MISUSES)
def test_emulator_reports_misuse_of_barriers_and_warpgroups(misuse, name, seed):
    assert misuse(name, shared_bytes=8192, seed=seed).startswith(WARPGROUP_MISUSES[name])


@pytest.mark.parametrize("seed", cuda_emulator.SCHEDULES.values(), ids=cuda_emulator.SCHEDULES)
@pytest.mark.parametrize("name", CLUSTER_MISUSES)
def test_emulator_reports_misuse_between_blocks(misuse, name, seed):
    assert misuse(name, seed=seed, blocks=2).startswith(CLUSTER_MISUSES[name])


def test_emulator_refuses_a_grid_that_clusters_do_not_divide(misuse):
    assert misuse("half_a_warp", blocks=3).startswith("launch: 3 blocks in clusters of 2")


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "message"),
    [
        (2048, 0, "launch: 2048 threads a block"),
        (48, 0, "launch: 48 threads a block"),
        (32, 228 * 1024, "launch: 233472 bytes of shared memory"),
    ],
)
def test_emulator_refuses_launches_that_a_gpu_refuses(misuse, threads, shared_bytes, message):
    assert misuse("half_a_warp", threads, shared_bytes).startswith(message)


def test_emulator_tells_where_a_misuse_happened(misuse):
    assert misuse("misaligned_copy").endswith("(block 0, 0, 0, thread 0)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_emulator_converts_every_half_as_torch_does(tmp_path_factory, dtype):
    """All 65536 are widened; values between neighbours, among them ties, are narrowed."""
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    folder = tmp_path_factory.mktemp("conversions")
    library = ctypes.CDLL(str(cuda_emulator.build(folder, "conversions.cpp")))
    kind = b"half" if dtype == torch.float16 else b"bfloat16"
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = torch.empty(2**16)
    library.widen(kind, ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(wide.data_ptr()), 2**16)
    expected = bits.view(dtype).float()
    assert torch.equal(wide.isnan(), expected.isnan())
    assert torch.equal(wide[~wide.isnan()], expected[~expected.isnan()])

    finite = expected[expected.isfinite()].sort().values.unique()
    middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    values = torch.cat(
        [finite, middles, torch.nextafter(middles, up), torch.nextafter(middles, down),
         torch.tensor([65519.99, 65520.0, 1e38, 3.4e38, -1e-45, torch.inf, -torch.inf])]
    )  # fmt: skip
    rounded = torch.empty(values.shape, dtype=torch.int16)
    library.narrow(
        kind, ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(rounded.data_ptr()), len(values)
    )
    assert torch.equal(rounded.view(dtype), values.to(dtype))
