"""Every wrapper of csrc/ptx.cuh against a plain computation: in the emulator, and on a GPU."""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest
import torch

PRODUCTS = [f"multiply {dtype} {a} {b}" for dtype in ("bfloat16", "float16", "float32", "tf32")
            for a in ("a", "a^T") for b in ("b", "b^T")]  # fmt: skip
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Wrappers:
    """`run_wrapper` of a compiled wrappers.cu, for tensors of one device."""

    def __init__(self, library: Path, device: str) -> None:
        self.function = ctypes.CDLL(str(library)).run_wrapper
        self.function.argtypes = [ctypes.c_char_p] + [ctypes.c_void_p] * 3
        self.device = device

    def run(self, name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        a, b, out = (t.contiguous().to(self.device, copy=True) for t in (a, b, out))
        assert self.function(name.encode(), a.data_ptr(), b.data_ptr(), out.data_ptr()) == 0
        return out.cpu()


def compile_for_gpu(folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location(
        "adapterkern_setup", cuda_emulator.SOURCES.parent / "setup.py"
    )
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup
    spec.loader.exec_module(setup)
    nvcc, library = setup.find_nvcc({}), folder / "wrappers.so"
    major, minor = torch.cuda.get_device_capability()
    arch = f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}"
    command = [nvcc, "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static", arch]
    source = cuda_emulator.HERE / "wrappers.cu"
    subprocess.run([*command, f"-I{cuda_emulator.SOURCES}", "-o", library, source], check=True)
    return library


@pytest.fixture(scope="module", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def wrappers(request, tmp_path_factory) -> Wrappers:
    folder = tmp_path_factory.mktemp("wrappers")
    if request.param == "emulator":
        if cuda_emulator.missing() is not None:
            pytest.skip(cuda_emulator.missing())
        return Wrappers(cuda_emulator.build(folder, "wrappers.cu"), "cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Wrappers(compile_for_gpu(folder), "cuda")


def rounded_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest value of 10 explicit bits, with ties away from zero."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_copy_async_copies_the_given_bytes_and_fills_up_with_zeros(wrappers):
    source = torch.arange(1, 513, dtype=torch.int16).to(torch.uint8)
    out = wrappers.run("copy_async", source, source, torch.full((1024,), 77, dtype=torch.uint8))
    kept = torch.arange(16)[None, :] < (torch.arange(32) % 17)[:, None]
    assert torch.equal(out[:512].view(32, 16), torch.where(kept, source.view(32, 16), 0))
    assert torch.equal(out[512:], source)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_load_matrices_gives_each_lane_its_pairs(wrappers, transposed):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    name = "load_matrices_transposed" if transposed else "load_matrices"
    out = wrappers.run(name, matrices, matrices, torch.zeros(32, 4, dtype=torch.int32))
    if transposed:
        matrices = matrices.mT
    pairs = matrices.reshape(4, 32, 2).to(torch.int32)  # [matrix, lane, pair]
    assert torch.equal(out, (pairs[..., 0] + (pairs[..., 1] << 16)).T)


@pytest.mark.parametrize("name", HALVES)
def test_mma_adds_the_product(wrappers, name):
    a, b = drawn(16, 16).to(HALVES[name]), drawn(16, 8).to(HALVES[name])
    before = drawn(16, 8)
    out = wrappers.run(f"mma {name}", a, b, before)
    torch.testing.assert_close(out.double(), before + a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_conversion_rounds_to_tf32_with_ties_away_from_zero(wrappers):
    tie = 1.0 + 2.0**-11
    values = torch.tensor([1.0, tie, -tie, tie + 2.0**-20, tie - 2.0**-20, 3.4e38, 1e-40, 0.0] * 4)
    out = wrappers.run("to_tf32", values, values, torch.zeros(32, dtype=torch.int32))
    out &= ~0x1FFF  # the tensor cores ignore the other bits
    assert torch.equal(out.view(torch.float32), rounded_to_tf32(values))
    up = 1.0 + 2.0**-10
    assert out[:5].view(torch.float32).tolist() == [1.0, up, -up, up, 1.0]


def test_mma_adds_the_product_of_tf32(wrappers):
    a, b, before = drawn(16, 8), drawn(8, 8), drawn(16, 8)
    out = wrappers.run("mma tf32", a, b, before)
    product = rounded_to_tf32(a).double() @ rounded_to_tf32(b).double()
    torch.testing.assert_close(out.double(), before + product, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_cluster_read_and_write_one_another(wrappers):
    if wrappers.device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    held = drawn(4, 32, 4)
    out = wrappers.run("cluster", held, held, torch.full((4, 33, 4), torch.nan))
    given = held.roll(1, 0)  # block r reads r + 1 and writes into r + 2
    assert torch.equal(out[:, :32], given)
    assert out[:, 32, :2].tolist() == [[float(rank), 4.0] for rank in range(4)]


def needs_warpgroups(wrappers):
    if wrappers.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("transposed", [False, True], ids=["b^T", "b"])
def test_warpgroups_multiply_swizzled_tiles(wrappers, name, transposed):
    needs_warpgroups(wrappers)
    a, b = drawn(64, 64).to(HALVES[name]), drawn(64, 64).flip(0).to(HALVES[name])
    kernel = f"warpgroup {name}" + " b^T" * transposed  # as wgmma calls a b that is not transposed
    out = wrappers.run(kernel, a, b, torch.full((64, 64), torch.nan))
    product = a.double() @ (b.double() if transposed else b.double().T)
    torch.testing.assert_close(out.double(), product, rtol=1e-5, atol=1e-4)


def test_asynchronous_stores_reach_other_blocks(wrappers):
    needs_warpgroups(wrappers)
    held = drawn(4, 32, 4)
    out = wrappers.run("store_async", held, held, torch.full((4, 32, 4), torch.nan))
    assert torch.equal(out, held.roll(1, 0))


def test_shuffle_exchanges_lanes(wrappers):
    values = drawn(32)
    out = wrappers.run("shuffle", values, values, torch.zeros(32))
    assert torch.equal(out, values[torch.arange(32) ^ 5])


@pytest.mark.parametrize("name", PRODUCTS)
def test_multiply_is_the_matrix_product(wrappers, name):
    kind = name.split()[1]
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    a, b = drawn(16, 64).to(dtype), drawn(64, 32).to(dtype)
    given = (a.T if "a^T" in name else a).contiguous(), (b.T if "b^T" in name else b).contiguous()
    out = wrappers.run(name, *given, torch.full((16, 32), torch.nan))
    if kind == "tf32":
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
