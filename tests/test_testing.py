"""adapterkern.testing: the interpreter's bfloat16 is exact, uninitialised memory shows as NaN."""

import json
import os
import subprocess
import sys

import pytest
import torch

import adapterkern as ak
from adapterkern.testing import enable_triton_interpreter, lost_device, nan_filled_memory

# Runs in a process of its own: the environment chooses the interpreter when a kernel is defined.
PROBE = """
import json
import torch, triton, triton.language as tl
from adapterkern.testing import enable_triton_interpreter

enable_triton_interpreter()
enable_triton_interpreter()  # a second call must not wrap the wrapper

@triton.jit
def cast_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(target_ptr + index, tl.load(source_ptr + index).to(target_ptr.dtype.element_ty))

@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"))

def cast(source, dtype):
    target = torch.empty(source.shape, dtype=dtype)
    cast_kernel[(source.numel() // 1024,)](source, target, SIZE=1024)
    return target

def mismatches(got, expected):
    same = (got == expected) | (got.isnan() & expected.isnan())
    signs = torch.signbit(got) == torch.signbit(expected)
    return int((~same | (~signs & ~expected.isnan())).sum())

report = {}
every_int16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
patterns = every_int16.view(torch.bfloat16)
report["widen to float32"] = mismatches(cast(patterns, torch.float32), patterns.float())
report["narrow to float16"] = mismatches(cast(patterns, torch.float16), patterns.half())

# Around every bfloat16: itself, both neighbours of it and of the tie above it, and the tie.
upper = torch.arange(2**16, dtype=torch.int64) << 16
bits = torch.cat([upper + offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
report["round from float32"] = mismatches(cast(values, torch.bfloat16), values.bfloat16())
halves = every_int16.view(torch.float16)
report["round from float16"] = mismatches(cast(halves, torch.bfloat16), halves.bfloat16())
integers = torch.arange(-(2**16), 2**16, dtype=torch.int32)
report["round from int32"] = mismatches(cast(integers, torch.bfloat16), integers.bfloat16())

torch.manual_seed(0)
a, b, c = torch.randn(32, 64).bfloat16(), torch.randn(64, 16).bfloat16(), torch.empty(32, 16)
dot_kernel[(1,)](a, b, c, M=32, K=64, N=16)
report["dot error"] = float((c - a.double() @ b.double()).abs().max())
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def interpreter_report(tmp_path_factory):
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("interpreter") / "probe.py"
    path.write_text(PROBE)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    probe = subprocess.run(
        [sys.executable, "-W", "ignore", path], env=env, capture_output=True, text=True
    )
    assert probe.returncode == 0, probe.stderr
    return json.loads(probe.stdout)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "conversion",
    [
        "widen to float32",
        "narrow to float16",
        "round from float32",
        "round from float16",
        "round from int32",
    ],
)
def test_interpreter_casts_agree_with_torch_for_every_value(interpreter_report, conversion):
    assert interpreter_report[conversion] == 0


def test_interpreter_bfloat16_dot_is_exact_up_to_float32_accumulation(interpreter_report):
    # Sums of 64 products of normals, about 8: float32 stays below 1e-5; raw bits would give 1e10.
    assert interpreter_report["dot error"] < 1e-5


def test_enable_triton_interpreter_outside_the_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.setattr("adapterkern._env.TRITON_INTERPRET", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 python -m pytest"):
        enable_triton_interpreter()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda t: torch.empty(5),
        lambda t: torch.empty_like(t),
        lambda t: torch.empty_strided((2, 3), (3, 1), dtype=torch.bfloat16),
        lambda t: t.new_empty(4),
    ],
)
def test_nan_filled_memory_fills_every_allocation(allocate):
    with nan_filled_memory():
        assert allocate(torch.zeros(3)).isnan().all()


def test_nan_filled_memory_reaches_allocations_inside_the_registered_op(monkeypatch):
    """A backend that leaves its output unwritten yields NaN, through the dispatcher too."""
    from adapterkern.backends.base import empty_outputs
    from adapterkern.backends.reference.backend import ReferenceBackend

    monkeypatch.setattr(
        ReferenceBackend, "forward", lambda self, call, save: empty_outputs(call, save)
    )
    with nan_filled_memory(), torch.no_grad():
        y = ak.bottleneck_adapter(
            torch.ones(3, 8), torch.ones(2, 8), torch.ones(8, 2), backend="reference"
        )
    assert y.isnan().all()


def test_nan_filled_memory_restores_torch_settings_after_an_error():
    with pytest.raises(KeyError), nan_filled_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_lost_device_is_none_on_a_cpu_and_where_the_device_answers(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    assert lost_device("cpu") is None
    assert lost_device("cuda:1") is None
    assert asked == ["cuda:1"]


def test_lost_device_gives_the_first_line_of_what_the_device_says(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert lost_device(torch.device("cuda", 1)) == "cuda:1 is lost: CUDA error: misaligned address"


@pytest.mark.thorough
def test_the_interpreter_a_user_asks_for_has_exact_bfloat16():
    """With nothing but the variable set: gradients too, against the reference."""
    pytest.importorskip("triton")
    code = (
        "import torch, adapterkern as ak\n"
        "torch.manual_seed(0)\n"
        "adapter = ak.BottleneckAdapter(32, 8, init='bert', dtype=torch.bfloat16)\n"
        "x = torch.randn(5, 32).bfloat16().requires_grad_()\n"
        "results = []\n"
        "for adapter.backend in ('auto', 'reference'):\n"
        "    y = adapter(x, residual=None)\n"
        "    leaves = [x, *adapter.parameters()]\n"
        "    results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])\n"
        "adapter.backend = 'auto'\n"
        "print(ak.explain(adapter, x).backend)\n"
        "for found, want in zip(*results):\n"
        "    print(float((found - want).float().norm() / want.float().norm()))"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    backend, *errors = ran.stdout.split()
    assert backend == "triton"
    assert len(errors) == 6
    assert max(map(float, errors)) < 0.01, errors
