"""The Triton backend's launches on a recorded, stand-in GPU: which kernels, what grids, what
arguments.
"""

import pytest
import torch
from allocations import Allocations

pytest.importorskip("triton", reason="triton is not installed")

import triton_sass
from fake_gpu import FakeGpu, fake_gpu, pointers

from adapterkern.backends import get
from adapterkern.backends.triton.launch_config import Device
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import AdapterCall

HIDDEN, BOTTLENECK = 256, 48
ALL = Needs(*[True] * 5, scaling=True)


def make_call(tokens, dtype=torch.bfloat16, hidden=HIDDEN, channel=True, **changes):
    bottleneck = BOTTLENECK
    parts = {
        "x": torch.zeros(tokens, hidden, dtype=dtype),
        "down_weight": torch.zeros(bottleneck, hidden, dtype=dtype),
        "up_weight": torch.zeros(hidden, bottleneck, dtype=dtype),
        "down_bias": torch.zeros(bottleneck, dtype=dtype),
        "up_bias": torch.zeros(hidden, dtype=dtype),
        "residual": None,
        "skip": torch.zeros(tokens, hidden, dtype=dtype),
        "scaling": torch.zeros(hidden if channel else 1, dtype=dtype),
        "norm_weight": None,
        "norm_bias": None,
        "scale": 1.0,
        "add_input": True,
        "activation": "gelu",
        "compute_dtype": dtype,
    }
    return AdapterCall(**{**parts, **changes})


def run(gpu, call, needs=ALL):
    with fake_gpu(gpu):
        backend = get("triton")
        outputs, saved = backend.forward(call, save=True)
        gradients = backend.backward(call, saved, Outputs(torch.zeros_like(outputs.y)), needs)
    return outputs.y, saved.z, gradients, {launch.kernel: launch for launch in gpu.launches}


def arguments_of(launches):
    return [launch.arguments for launch in launches.values()]


def test_many_tokens_launch_one_forward_kernel_over_row_blocks():
    call = make_call(128 * 132)
    y, z, gradients, launches = run(FakeGpu(), call)
    assert list(launches) == [
        "bottleneck_fwd_kernel",
        "bottleneck_bwd_dx_kernel",
        "bottleneck_bwd_dw_kernel",
        "bottleneck_bwd_dw_sum_kernel",
    ]
    forward = launches["bottleneck_fwd_kernel"]
    assert forward.grid == (264, 1, 1)  # of 64 tokens each
    given = pointers(forward)
    for name in ("x", "down_weight", "up_weight", "down_bias", "up_bias", "skip", "scaling"):
        assert given[f"{name}_ptr"].data_ptr() == getattr(call, name).data_ptr(), name
    assert given["y_ptr"] is y
    assert given["z_ptr"] is z
    assert forward.arguments["residual_ptr"] is None
    sizes = ("num_tokens", "hidden_size", "bottleneck_size", "stride_x_token", "stride_skip_token")
    given = [forward.arguments[name] for name in sizes]
    assert given == [128 * 132, HIDDEN, BOTTLENECK, HIDDEN, HIDDEN]
    dx = pointers(launches["bottleneck_bwd_dx_kernel"])["dx_ptr"]
    assert dx is gradients.x
    sums = pointers(launches["bottleneck_bwd_dw_sum_kernel"])
    assert sums["d_down_ptr"] is gradients.down_weight
    assert sums["d_up_ptr"] is gradients.up_weight
    assert sums["d_down_bias_ptr"] is gradients.down_bias
    assert sums["d_up_bias_ptr"] is gradients.up_bias


def test_few_tokens_launch_two_forward_kernels_over_slices_of_h():
    _, _, _, launches = run(FakeGpu(), make_call(2, hidden=1024))
    assert list(launches)[:4] == [
        "bottleneck_fwd_down_kernel",
        "bottleneck_fwd_up_kernel",
        "bottleneck_bwd_split_dz_kernel",
        "bottleneck_bwd_split_dx_kernel",
    ]
    down, up = launches["bottleneck_fwd_down_kernel"], launches["bottleneck_fwd_up_kernel"]
    assert down.grid == (1, 1, 4)
    assert up.grid == (1, 16, 1)
    partial = pointers(up)["partial_ptr"]
    assert partial.shape == (4, 2, BOTTLENECK)
    assert partial is pointers(down)["partial_ptr"]


def test_output_without_backward_allocates_no_bottleneck():
    gpu = FakeGpu()
    with fake_gpu(gpu):
        _, saved = get("triton").forward(make_call(128 * 132), save=False)
    assert saved.z is None
    assert gpu.launches[0].arguments["z_ptr"] is None


@pytest.mark.parametrize(
    ("needs", "kernels"),
    [
        (Needs(x=True), ["bottleneck_bwd_dx_kernel"]),
        (
            Needs(up_weight=True, up_bias=True),
            [
                "bottleneck_bwd_dx_kernel",
                "bottleneck_bwd_dw_kernel",
                "bottleneck_bwd_dw_sum_kernel",
            ],
        ),
        (Needs(up_bias=True), ["bottleneck_bwd_dw_kernel", "bottleneck_bwd_dw_sum_kernel"]),
        (Needs(), []),
    ],
    ids=[
        "frozen-adapter-needs-dx-alone",
        "up-projection-needs-a-alone",
        "up-bias-needs-dy-alone",
        "nothing",
    ],
)
def test_backward_launches_only_what_is_asked_for(needs, kernels):
    _, _, gradients, launches = run(FakeGpu(), make_call(128 * 132), needs)
    assert [name for name in launches if "bwd" in name] == kernels
    assert [g is not None for g in gradients] == list(needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("tokens", [3, 128 * 132], ids=["split", "row-block"])
def test_launches_compile_in_every_dtype_and_scaling(dtype, tokens):
    """The dtypes mix as under autocast, with a learned scalar and an external residual."""
    residual = torch.zeros(tokens, HIDDEN)
    call = make_call(tokens, dtype, channel=False, add_input=False, residual=residual)
    y, _, gradients, launches = run(FakeGpu(), call)
    assert y.dtype == torch.float32
    assert gradients.scaling.shape == (1,)
    product = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    assert {a["DTYPE"].name for a in arguments_of(launches) if "DTYPE" in a} == {product}


@pytest.mark.parametrize(
    ("hidden", "bottleneck", "types"),
    [
        (4096, 256, {"weights": torch.float32}),
        (768, 384, {"residual": torch.float32}),
        (768, 48, {"residual": torch.float32}),
        (768, 48, {"scaling": torch.float32}),
        (768, 48, {"weights": torch.float32, "residual": torch.float32}),
    ],
    ids=["weights", "residual-split", "residual", "scaling", "weights-and-residual"],
)
def test_float32_beside_bfloat16_fits_the_smallest_shared_memory(hidden, bottleneck, types):
    """The launch asks for less than the 99 KB of a consumer card, or `run` raises."""
    tokens, weights = 16384, types.get("weights", torch.bfloat16)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    external = {"residual": torch.empty(tokens, hidden), "add_input": False}
    call = make_call(
        tokens,
        hidden=hidden,
        x=x,
        down_weight=torch.empty(bottleneck, hidden, dtype=weights),
        up_weight=torch.empty(hidden, bottleneck, dtype=weights),
        down_bias=None,
        up_bias=None,
        skip=None,
        scaling=torch.empty(hidden) if "scaling" in types else None,
        **(external if "residual" in types else {}),
    )
    gpu = FakeGpu(capability=89, device=Device(num_sms=128, shared_memory=99 * 1024))
    needs = Needs(True, True, True, scaling=call.scaling is not None)
    y, _, _, launches = run(gpu, call, needs)
    assert y.dtype == (torch.bfloat16 if types.keys() == {"weights"} else torch.float32)
    assert len(launches) >= 3


def test_strided_tensors_are_read_in_place_and_odd_ones_copied_once():
    wide = torch.zeros(2, 128 * 132, 2 * HIDDEN, dtype=torch.bfloat16)
    gpu = FakeGpu()
    transposed = torch.zeros(HIDDEN, 128 * 132, dtype=torch.bfloat16).T
    run(gpu, make_call(128 * 132, x=wide[0, :, :HIDDEN], skip=transposed))
    forward = gpu.launches[0]
    assert forward.arguments["x_ptr"].data_ptr() == wide.data_ptr()
    assert forward.arguments["stride_x_token"] == 2 * HIDDEN
    assert forward.arguments["stride_skip_token"] == HIDDEN


def test_partial_sums_are_the_only_scratch_memory():
    """No [T, H] tensor is transient: beside outputs and z there are only dz, a and the weight
    gradients' partial sums.
    """
    call = make_call(128 * 132)
    with Allocations() as allocated:
        run(FakeGpu(), call)
    rows = [t for t in allocated if t.shape[:1] == call.x.shape[:1] and t.shape[-1:] == (HIDDEN,)]
    assert len(rows) == 3  # y, dx, and dy, which `run` makes
    # And z, dz, a, 4 partial sums, 4 gradients, d(scaling).
    assert len(allocated) == 3 + 3 + 4 + 4 + 1


@pytest.mark.parametrize("tokens", [2, 128 * 132], ids=["split", "row-block"])
def test_a_alone_is_computed_without_reading_dy(tokens):
    _, _, _, launches = run(FakeGpu(), make_call(tokens), Needs(up_weight=True))
    (name,) = (name for name in launches if name.endswith(("dx_kernel", "split_dz_kernel")))
    given = launches[name].arguments
    assert given["a_ptr"].shape == (tokens, BOTTLENECK)
    assert given["dz_ptr"] is None
    assert given.get("dx_ptr") is None
    assert given.get("partial_ptr") is None
    assert "HGMMA" not in triton_sass.disassemble(launches[name].cubin)
    weights = launches["bottleneck_bwd_dw_kernel"].arguments
    assert weights["a_ptr"] is given["a_ptr"]
    assert weights["dz_ptr"] is None


@pytest.mark.parametrize("bottleneck", [5, 10, 24, 100])
@pytest.mark.parametrize("tokens", [2, 128 * 132], ids=["split", "row-block"])
def test_rows_of_units_begin_at_16_bytes(tokens, bottleneck):
    """z, dz, a and partial sums, for every R; a z that was packed meanwhile is copied."""
    call = make_call(
        tokens,
        hidden=1024,
        down_weight=torch.zeros(bottleneck, 1024, dtype=torch.bfloat16),
        up_weight=torch.zeros(1024, bottleneck, dtype=torch.bfloat16),
        down_bias=None,
        scaling=None,
    )
    stride = -(-bottleneck // 8) * 8
    _, z, _, launches = run(FakeGpu(), call, Needs(True, True, True))
    assert z.shape == (tokens, bottleneck)
    checked = 0
    for launch in launches.values():
        for name, tensor in pointers(launch).items():
            if name in ("z_ptr", "dz_ptr", "a_ptr", "partial_ptr"):
                assert tensor.stride()[-2:] == (stride, 1), name
                assert launch.arguments["stride_unit_token"] == stride
                checked += 1
    assert checked >= 6
    gpu = FakeGpu()
    with fake_gpu(gpu):
        packed, dy = Saved(z.contiguous()), Outputs(torch.zeros_like(call.x))
        get("triton").backward(call, packed, dy, Needs(True))
    assert pointers(gpu.launches[0])["z_ptr"].stride() == (stride, 1)


@pytest.mark.parametrize(
    ("scaling", "scale", "given"),
    [(None, 1.0, (None, None)), (None, 0.5, (None, 0.5)), ("learned", 1.0, ("tensor", None))],
    ids=["one", "float", "learned"],
)
def test_a_scaling_of_one_costs_the_kernels_nothing(scaling, scale, given):
    """It is None to the compiler, and dy goes into its product from shared memory."""
    learned = torch.zeros(1, dtype=torch.bfloat16) if scaling else None
    call = make_call(128 * 132, scaling=learned, scale=scale)
    _, _, _, launches = run(FakeGpu(), call, Needs(True))
    for launch in launches.values():
        seen = launch.arguments["scaling_ptr"], launch.arguments["scale"]
        assert (seen[0] is not None, seen[1]) == (given[0] is not None, given[1])
