"""Only a CUDA device can show these: streams, graphs, memory, large offsets, several devices."""

import pytest
import torch
from eager import eager_adapter, gradients, tensors

import adapterkern as ak
from adapterkern.backends import NAMES, get
from adapterkern.parity import Case, check_case, differing_bits, grid, refusals
from adapterkern.testing import nan_filled_memory

pytestmark = pytest.mark.gpu

KERNELS = [name for name in NAMES if name != "reference"]
HALF = torch.bfloat16


@pytest.fixture(params=KERNELS)
def backend(request):
    reason = get(request.param).unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def on_gpu(arguments, device="cuda"):
    return {name: t.detach().to(device).requires_grad_() for name, t in arguments.items()}


def cases_of(name):
    kernels = get(name)
    return [
        (name, case)
        for case in grid(kernels.dtypes, kernels.activations, features=kernels.features)
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [pair for name in KERNELS for pair in cases_of(name)],
    ids=lambda value: str(value),
)
def test_kernels_match_float64(name, case):
    reasons = refusals(case, name, "cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    with nan_filled_memory():
        rows = check_case(case, name, "cuda")
    assert not [str(row) for row in rows if not row.passed]


def test_a_machine_with_a_gpu_runs_a_kernel():
    adapter = ak.BottleneckAdapter(768, device="cuda", dtype=HALF)
    x = torch.zeros(8, 768, device="cuda", dtype=HALF)
    assert ak.explain(adapter, x).backend in KERNELS


@pytest.mark.parametrize("tokens", [3, 500, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
def test_a_second_run_gives_the_same_bits(backend, tokens, dtype):
    case = Case(dtype, shape=(tokens,), hidden_size=768, bottleneck_size=48, scaling="channel")
    assert differing_bits(case, backend, "cuda") == []


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
def test_fifty_runs_of_a_row_block_give_the_same_bits(backend, dtype):
    """A copy that a product overtakes shows now and then, not every time."""
    case = Case(dtype, shape=(14208,), hidden_size=128, bottleneck_size=49)
    assert differing_bits(case, backend, "cuda", runs=50) == []


@pytest.mark.parametrize("sizes", [(2048, 4096), (16384, 1024)], ids=str)
def test_fifty_runs_of_a_headline_shape_give_the_same_bits(backend, sizes):
    """There a tile of 32 tokens and 128 features in the weight gradients of Triton 3.6 did not."""
    case = Case(HALF, shape=sizes[:1], hidden_size=sizes[1], bottleneck_size=64)
    assert differing_bits(case, backend, "cuda", runs=50) == []


@pytest.mark.parametrize("tokens", [4, 4096])
def test_repeated_launches_read_and_write_the_memory_of_their_own_call(backend, tokens):
    """The launches of two inputs in turns, from the third call on with addresses alone changed."""
    inputs = [tensors((tokens,), 768, 48, HALF, seed=seed) for seed in range(2)]
    seen = []
    for number in range(6):
        with ak.use_backend(backend):
            y, computed = gradients(ak.bottleneck_adapter, on_gpu(inputs[number % 2]))
        seen.append([y.clone(), *(gradient.clone() for gradient in computed.values())])
    for number in range(2, 6):
        pairs = zip(seen[number % 2], seen[number], strict=True)
        assert all(torch.equal(first, later) for first, later in pairs)
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("tokens", [4, 4096])
def test_forward_and_backward_replay_from_a_cuda_graph(backend, tokens):
    arguments = on_gpu(tensors((tokens,), 768, 48, HALF))
    leaves = list(arguments.values())
    grad_output = torch.randn(tokens, 768, device="cuda", dtype=HALF)

    def step():
        y = ak.bottleneck_adapter(**arguments, backend=backend)
        return y, torch.autograd.grad(y, leaves, grad_output)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, found = step()
    with torch.no_grad():
        arguments["x"].copy_(torch.randn_like(arguments["x"]))
    graph.replay()
    torch.cuda.synchronize()
    expected_y, expected = step()
    assert torch.equal(y, expected_y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_streams_do_not_disturb_each_other(backend):
    problems = [on_gpu(tensors((2048,), 768, 48, HALF, seed=seed)) for seed in range(2)]
    expected = [gradients(ak.bottleneck_adapter, p, backend=backend) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found = [None, None]
    for _ in range(5):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[index] = gradients(ak.bottleneck_adapter, problems[index], backend=backend)
    torch.cuda.synchronize()
    for (y, grads), (want_y, want) in zip(found, expected, strict=True):
        assert torch.equal(y, want_y)
        assert all(torch.equal(grads[name], want[name]) for name in want)


def test_offsets_survive_more_than_2_to_the_31_elements(backend):
    hidden = 4096
    tokens = 2**31 // hidden + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2 * tokens * hidden:
        pytest.skip(f"needs {6 * 2 * tokens * hidden / 2**30:.0f} GiB of GPU memory")
    small = on_gpu(tensors((), hidden, 16, HALF))
    weights = {name: t for name, t in small.items() if name != "x"}
    x = torch.zeros(tokens, hidden, device="cuda", dtype=HALF)
    last = torch.randn(7, hidden, device="cuda").to(HALF)
    x[-7:] = last
    x.requires_grad_()
    y = ak.bottleneck_adapter(x, **weights, backend=backend)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    few = last.clone().requires_grad_()
    expected = ak.bottleneck_adapter(few, **weights, backend=backend)
    (expected_dx,) = torch.autograd.grad(expected, few, expected.detach())
    # By their norms: with so wide a sum, single elements are small differences of large numbers.
    assert (y[-7:] - expected).norm() < 0.01 * expected.norm()
    assert (dx[-7:] - expected_dx).norm() < 0.01 * expected_dx.norm()
    assert torch.equal(y[0], y[tokens // 2])


def test_no_transient_tensor_has_the_size_of_x(backend):
    tokens, hidden, bottleneck = 16384, 1024, 64
    arguments = on_gpu(tensors((tokens,), hidden, bottleneck, HALF))
    grad_output = torch.randn(tokens, hidden, device="cuda", dtype=HALF)
    of_x, of_z = 2 * tokens * hidden, 2 * tokens * bottleneck

    def peak_of(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        return kept, torch.cuda.max_memory_allocated() - before

    ak.bottleneck_adapter(**arguments, backend=backend).backward(
        grad_output
    )  # compile, allocate .grad
    y, peak = peak_of(lambda: ak.bottleneck_adapter(**arguments, backend=backend))
    assert peak < of_x + of_z + 0.1 * of_x
    leaves = list(arguments.values())
    _, peak = peak_of(lambda: torch.autograd.grad(y, leaves, grad_output))
    # These are dx, dz, a, and the partial sums of the weight gradients.
    assert peak < of_x + 2 * of_z + 0.5 * of_x


@pytest.mark.parametrize("half", [torch.float16, HALF], ids=["fp16", "bf16"])
@pytest.mark.parametrize("x_half", [True, False], ids=["x-half", "x-fp32"])
def test_autocast_gives_the_dtypes_of_eager(backend, half, x_half):
    arguments = tensors((64,), 768, 48, torch.float32, residual=True, scaling=768)
    if x_half:
        arguments["x"] = arguments["x"].to(half)
    arguments = on_gpu(arguments)
    with torch.autocast("cuda", half):
        y, found = gradients(ak.bottleneck_adapter, arguments, backend=backend)
        want_y, want = gradients(eager_adapter, arguments)
    assert y.dtype == want_y.dtype
    torch.testing.assert_close(y, want_y, rtol=0.03, atol=0.03)
    for name in want:
        assert found[name].dtype == want[name].dtype
        error = (found[name].double() - want[name].double()).norm() / want[name].double().norm()
        assert error < 0.05, name


def test_a_device_that_is_not_current_is_used(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = tensors((64,), 768, 48, torch.float32)
    with torch.cuda.device(0):
        y, found = gradients(ak.bottleneck_adapter, on_gpu(arguments, "cuda:1"), backend=backend)
    want_y, want = gradients(eager_adapter, arguments)
    assert y.device == torch.device("cuda", 1)
    torch.testing.assert_close(y.cpu(), want_y, rtol=1e-4, atol=1e-4)
    for name in want:
        torch.testing.assert_close(found[name].cpu(), want[name], rtol=1e-3, atol=1e-3)


def test_compiled_code_runs_the_kernel(backend, recompiled):
    arguments = on_gpu(tensors((64,), 768, 48, HALF))
    compiled = torch.compile(ak.bottleneck_adapter, fullgraph=True)
    y, found = gradients(compiled, arguments, backend=backend)
    want_y, want = gradients(ak.bottleneck_adapter, arguments, backend=backend)
    assert torch.equal(y, want_y)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=0.02, atol=0.02)


def test_float64_on_a_gpu_falls_back_with_one_log_line(clean_dispatch, caplog):
    for _ in range(2):
        arguments = on_gpu(tensors((4,)))
        y, _ = gradients(ak.bottleneck_adapter, arguments)
        torch.testing.assert_close(y, eager_adapter(**arguments))
    assert len(caplog.records) == 1
    assert "dtype float64 is not supported" in caplog.text
