"""The roofline's numbers against sums done by hand."""

import pytest

from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.roofline import Machine

H200 = Machine(copy_bandwidth=4.3e12, matrix_rate=790e12, launch_seconds=2.2e-6)


def case(tokens, hidden=1024, bottleneck=64, mode="forward", dtype="bf16"):
    return BenchCase(hidden, bottleneck, tokens, dtype, mode=mode)


def test_forward_floor_reads_x_and_both_weights_and_writes_y():
    # 16384 x 1024 x 2 B = 33554432 a pass; each weight is 64 x 1024 x 2 B = 131072.
    assert roofline.moved_bytes(case(16384)) == 2 * 33554432 + 2 * 131072
    assert roofline.seconds(case(16384), H200) * 1e6 == pytest.approx(67371008 / 4.3e6)


def test_step_floor_adds_z_and_the_three_passes_of_the_backward():
    # z is 16384 x 64 x 2 B = 2097152, written and read; the backward reads x, dy and writes dx,
    # reads both weights and writes both gradients.
    forward = 2 * 33554432 + 2097152 + 2 * 131072
    backward = 3 * 33554432 + 2097152 + 4 * 131072
    assert roofline.moved_bytes(case(16384, mode="backward")) == backward
    assert roofline.moved_bytes(case(16384, mode="step")) == forward + backward
    # 69.47 MB and 103.28 MB at 4.3 TB/s.
    step = roofline.seconds(case(16384, mode="step"), H200) * 1e6
    assert step == pytest.approx(16.16 + 24.02, abs=0.01)


def test_float32_moves_twice_the_bytes_of_bfloat16():
    narrow, wide = roofline.moved_bytes(case(100)), roofline.moved_bytes(case(100, dtype="fp32"))
    assert wide == 2 * narrow


@pytest.mark.parametrize(
    ("implementation", "passes"),
    [("floor", 2), ("adapterhub", 7), ("plain", 5), ("addmm", 5), ("cublaslt", 3), ("limit", 2)],
)
def test_forward_passes_over_an_activation(implementation, passes):
    # With one unit and many tokens nothing but whole passes over [T, H] is left.
    tall = BenchCase(4096, 1, 1 << 22)
    ratio = roofline.moved_bytes(tall, implementation) / (4096 * (1 << 22) * 2)
    assert ratio == pytest.approx(passes, rel=0.002)


@pytest.mark.parametrize(
    ("implementation", "passes"),
    [("floor", 3), ("adapterhub", 10), ("plain", 8), ("cublaslt", 5), ("compile", 9), ("limit", 3)],
)
def test_backward_passes_over_an_activation(implementation, passes):
    tall = BenchCase(4096, 1, 1 << 22, mode="backward")
    ratio = roofline.moved_bytes(tall, implementation) / (4096 * (1 << 22) * 2)
    assert ratio == pytest.approx(passes, rel=0.002)


UD, UR, WEIGHT = 33554432, 2097152, 131072  # of 16384 x 1024, 16384 x 64, 64 x 1024 in bfloat16


@pytest.mark.parametrize(
    ("implementation", "ud", "ur"), [("addmm", 5 + 8, 3 + 7), ("cublaslt", 3 + 5, 3 + 5)]
)
def test_a_recording_chain_writes_z_beside_a(implementation, ud, ur):
    # Forward: the first product writes z and a, the second reads a: 3 Ur. Backward of addmm: da
    # written, then da, z read and dz written, a and twice dz read: 7 Ur; the epilogue saves two.
    step = case(16384, mode="step")
    wanted = ud * UD + ur * UR + (2 + 4) * WEIGHT
    assert roofline.moved_bytes(step, implementation) == wanted


def test_a_limit_moves_its_own_bytes_in_a_step():
    assert roofline.moved_bytes(case(16384, mode="step"), "limit") == 5 * UD
    assert roofline.moved_bytes(case(16384), "limit") == 2 * UD


def test_the_floor_of_float32_is_at_the_rate_of_float32():
    single = case(16384, dtype="fp32")
    products = 4 * 16384 * 1024 * 64  # FLOPs
    memory = (4 * UD + 4 * WEIGHT) / 4.3e12  # 2 passes of 4 bytes: 31.3 us
    assert roofline.seconds(single, Machine(4.3e12, 400e12)) == pytest.approx(memory)
    ieee = Machine(4.3e12, 50e12)
    assert roofline.seconds(single, ieee) == pytest.approx(products / 50e12)  # 85.9 us
    assert roofline.bound(single, ieee) == "compute"
    assert roofline.seconds(single, Machine(4.3e12)) == pytest.approx(memory)  # rate not known


def test_few_tokens_cost_a_launch_for_each_kernel():
    assert roofline.seconds(case(16), H200) == 2.2e-6
    assert roofline.seconds(case(16), H200, "adapterhub") == pytest.approx(5 * 2.2e-6)
    assert roofline.seconds(case(16, mode="backward"), H200, "plain") == pytest.approx(8 * 2.2e-6)


def test_a_wide_bottleneck_is_bound_by_the_matrix_rate():
    wide = case(16384, hidden=4096, bottleneck=256)
    assert roofline.seconds(wide, H200) == pytest.approx(4 * 16384 * 4096 * 256 / 790e12)


@pytest.mark.parametrize(
    ("shape", "bound"),
    [
        ((16384, 1024, 64), "memory"),
        ((16384, 4096, 256), "compute"),
        ((16, 1024, 64), "launch"),
        ((16, 8192, 512), "weights"),
    ],
)
def test_bound_names_what_limits_the_floor(shape, bound):
    assert roofline.bound(case(*shape), H200) == bound
