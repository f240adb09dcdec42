"""The CUDA backend hands its extension addresses, strides and work space, but no copy of x."""

import contextlib
import math
import struct
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from allocations import Allocations

from adapterkern import _env
from adapterkern.backends import _loaded, get
from adapterkern.backends.cuda import backend as cuda_backend
from adapterkern.backends.cuda import extension
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.launch_config import token_plan
from adapterkern.backends.cuda.params import BackwardParams, ForwardParams, view
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import AdapterCall

HIDDEN, BOTTLENECK = 256, 48
ALL = Needs(*[True] * 5, scaling=True)


class Recorder:
    """Stands in for the extension: keeps what each launch got."""

    def __init__(self) -> None:
        self.launches: list = []

    def forward(self, packed: bytes, device: int, stream: int) -> None:
        self.launches.append((unpack(ForwardParams, packed), device, stream))

    def backward(self, packed: bytes, device: int, stream: int) -> None:
        self.launches.append((unpack(BackwardParams, packed), device, stream))


def unpack(kind, packed: bytes):
    *numbers, scale = struct.unpack(f"={len(packed) // 8 - 1}qf4x", packed)
    words = iter(numbers)
    fields = list(kind.__annotations__.values())[:-1]
    values = [next(words) if field is int else tuple(islice(words, 3)) for field in fields]
    return kind(*values, scale)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(_loaded, "cuda", CudaBackend(recorder, Device(num_sms=132)))
    return recorder


def make_call(tokens, dtype=torch.bfloat16, channel=True, **changes) -> AdapterCall:
    parts = {
        "x": torch.zeros(tokens, HIDDEN, dtype=dtype),
        "down_weight": torch.zeros(BOTTLENECK, HIDDEN, dtype=dtype),
        "up_weight": torch.zeros(HIDDEN, BOTTLENECK, dtype=dtype),
        "down_bias": torch.zeros(BOTTLENECK, dtype=dtype),
        "up_bias": torch.zeros(HIDDEN, dtype=dtype),
        "residual": None,
        "skip": torch.zeros(tokens, HIDDEN, dtype=dtype),
        "scaling": torch.zeros(HIDDEN if channel else 1, dtype=dtype),
        "norm_weight": None,
        "norm_bias": None,
        "scale": 0.5,
        "add_input": True,
        "activation": "silu",
        "compute_dtype": dtype,
    }
    return AdapterCall(**{**parts, **changes})


def test_forward_passes_every_tensor_by_its_name(recorder):
    call = make_call(128 * 132)
    outputs, saved = get("cuda").forward(call, save=True)
    y, z = outputs.y, saved.z
    ((params, device, stream),) = recorder.launches
    assert (device, stream) == (0, 0)  # the queue of CPU tensors
    for name in ("x", "down_weight", "up_weight", "down_bias", "up_bias", "skip", "scaling"):
        assert getattr(params, name) == view(getattr(call, name)), name
    assert (params.y, params.z, params.residual, params.partial) == (
        view(y), view(z), view(None), view(None),
    )  # fmt: skip
    sizes = params.num_tokens, params.hidden_size, params.bottleneck_size
    assert sizes == (128 * 132, HIDDEN, BOTTLENECK)
    options = params.num_splits, params.activation, params.compute_dtype, params.add_input
    assert options == (0, 3, 2, 1)
    assert (params.channel_scaling, params.scale) == (1, 0.5)


@pytest.mark.parametrize(("allowed", "code"), [(False, 0), (True, 3)], ids=["ieee", "tf32"])
def test_float32_products_follow_the_precision_that_torch_allows(
    recorder, monkeypatch, allowed, code
):
    monkeypatch.setattr(cuda_backend, "allow_tf32", lambda: allowed)
    call = make_call(300, dtype=torch.float32)
    outputs, saved = get("cuda").forward(call, save=True)
    y, z = outputs.y, saved.z
    get("cuda").backward(call, saved, Outputs(torch.zeros_like(y)), ALL)
    assert [launch[0].compute_dtype for launch in recorder.launches] == [code, code]
    assert y.dtype == z.dtype == torch.float32


def test_clusters_need_no_work_space(recorder, monkeypatch):
    device = Device(num_sms=132, cluster_memory=227 * 1024)
    monkeypatch.setitem(_loaded, "cuda", CudaBackend(recorder, device))
    call = make_call(8192)
    outputs, saved = get("cuda").forward(call, save=True)
    get("cuda").backward(call, saved, Outputs(torch.zeros_like(outputs.y)), ALL)
    for params, *_ in recorder.launches:
        assert (params.num_splits, params.features_per_split) == (2, HIDDEN // 2)
        assert (params.num_clusters, params.cluster_tokens) == (66, 64)
        assert params.partial == view(None)


def test_a_scaling_beyond_float32_is_infinite(recorder):
    for scale, passed in ((1e39, math.inf), (-1e39, -math.inf), (0.5, 0.5), (-0.0, -0.0)):
        get("cuda").forward(make_call(5, scaling=None, scale=scale), save=False)
        assert math.copysign(1, recorder.launches[-1][0].scale) == math.copysign(1, passed)
        assert recorder.launches[-1][0].scale == passed


def test_few_tokens_get_work_space_for_partial_sums(recorder):
    get("cuda").forward(make_call(5), save=False)
    ((params, *_),) = recorder.launches
    assert (params.num_splits, params.features_per_split) == (2, 128)
    assert (params.output_splits, params.features_per_output_split) == (2, 128)
    assert params.partial[0] != 0
    assert params.partial[1:] == (0, 64)  # rows of the width of a tile
    assert params.z == view(None)


def test_backward_passes_every_gradient_by_its_name(recorder):
    call = make_call(128 * 132, channel=False)
    z, dy = torch.zeros(128 * 132, BOTTLENECK, dtype=torch.bfloat16), torch.zeros_like(call.x)
    gradients = get("cuda").backward(call, Saved(z), Outputs(dy), ALL)
    ((params, *_),) = recorder.launches
    assert (params.dy, params.z) == (view(dy), view(z))
    assert params.dx == view(gradients.x)
    assert params.d_down_weight == view(gradients.down_weight)
    assert params.d_up_weight == view(gradients.up_weight)
    assert params.d_down_bias == view(gradients.down_bias)
    assert params.d_up_bias == view(gradients.up_bias)
    assert gradients.scaling.shape == (1,)
    assert gradients.scaling.dtype == torch.bfloat16
    assert params.channel_scaling == 0
    assert params.token_splits * params.tokens_per_split >= 128 * 132
    for name, width in (("sum_down", HIDDEN), ("sum_up", HIDDEN), ("dz", BOTTLENECK),
                        ("a", BOTTLENECK), ("sum_down_bias", BOTTLENECK),
                        ("sum_up_bias", HIDDEN)):  # fmt: skip
        assert getattr(params, name)[0] != 0, name
        assert getattr(params, name)[2] == width, name


@pytest.mark.parametrize(
    ("needs", "given"),
    [
        (Needs(x=True), {"dx"}),
        (Needs(down_weight=True), {"dz", "sum_down", "d_down_weight"}),
        (Needs(down_bias=True), {"dz", "sum_down_bias", "d_down_bias"}),
        (Needs(up_weight=True), {"a", "sum_up", "d_up_weight"}),
        (Needs(scaling=True), {"a", "sum_up", "sum_up_bias", "d_scaling"}),
    ],
    ids=["frozen-adapter", "down-weight", "down-bias", "up-weight", "scaling"],
)
def test_backward_gives_room_only_for_what_is_asked_for(recorder, needs, given):
    call = make_call(128 * 132)
    z, dy = torch.zeros(128 * 132, BOTTLENECK, dtype=torch.bfloat16), torch.zeros_like(call.x)
    gradients = get("cuda").backward(call, Saved(z), Outputs(dy), needs)
    ((params, *_),) = recorder.launches
    inputs = {"x", "dy", "z", "down_weight", "up_weight", "up_bias", "scaling"}
    views = {n for n in params._fields if isinstance(getattr(params, n), tuple)}
    assert {n for n in views - inputs if getattr(params, n)[0] != 0} == given
    assert [g is not None for g in gradients] == list(needs)
    assert (params.token_splits == 0) == (not needs.parameters)


def test_rows_of_dz_and_a_begin_at_sixteen_bytes_whatever_r_is(recorder):
    call = make_call(
        5,
        down_weight=torch.zeros(20, HIDDEN, dtype=torch.bfloat16),
        up_weight=torch.zeros(HIDDEN, 20, dtype=torch.bfloat16),
        down_bias=None,
    )
    z = torch.zeros(5, 20, dtype=torch.bfloat16)
    get("cuda").backward(call, Saved(z), Outputs(torch.zeros_like(call.x)), ALL)
    ((params, *_),) = recorder.launches
    assert params.dz[1:] == params.a[1:] == (2, 24)


def test_activation_alone_needs_no_slices_of_h(recorder):
    """Where dz is not needed dy is not read for it, so there is nothing to cut."""
    call = make_call(5)
    z = torch.zeros(5, BOTTLENECK, dtype=torch.bfloat16)
    get("cuda").backward(call, Saved(z), Outputs(torch.zeros_like(call.x)), Needs(up_weight=True))
    ((params, *_),) = recorder.launches
    assert (params.num_splits, params.num_clusters, params.partial) == (0, 0, view(None))


def test_strided_tensors_are_read_in_place_and_odd_ones_copied_once(recorder):
    wide = torch.zeros(2, 300, 2 * HIDDEN, dtype=torch.bfloat16)
    transposed = torch.zeros(HIDDEN, 300, dtype=torch.bfloat16).T
    get("cuda").forward(make_call(300, x=wide[0, :, :HIDDEN], skip=transposed), save=False)
    ((params, *_),) = recorder.launches
    assert params.x == (wide.data_ptr(), 2, 2 * HIDDEN)
    assert params.skip[0] != transposed.data_ptr()
    assert params.skip[2] == HIDDEN


def test_gradients_of_strided_inputs_are_contiguous(recorder):
    x = torch.zeros(HIDDEN, 300, dtype=torch.bfloat16).T
    call = make_call(300, x=x)
    z = torch.zeros(300, BOTTLENECK, dtype=torch.bfloat16)
    dx = get("cuda").backward(call, Saved(z), Outputs(torch.zeros(300, HIDDEN)), ALL).x
    assert dx.is_contiguous()
    assert recorder.launches[0][0].dx == (dx.data_ptr(), 2, HIDDEN)


def test_no_tokens_launch_nothing_and_give_zero_gradients(recorder):
    call = make_call(0)
    outputs, saved = get("cuda").forward(call, save=True)
    gradients = get("cuda").backward(call, saved, Outputs(torch.zeros_like(outputs.y)), ALL)
    assert recorder.launches == []
    assert outputs.y.shape == (0, HIDDEN)
    assert not any(g.any() for g in gradients if g is not None)
    assert gradients.scaling.shape == (HIDDEN,)


def test_partial_sums_are_the_only_scratch_memory(recorder):
    """Nothing beside outputs, z, dz and a is as long as the tokens."""
    call = make_call(128 * 132)
    with Allocations() as allocated:
        outputs, saved = get("cuda").forward(call, save=True)
        get("cuda").backward(call, saved, Outputs(outputs.y), ALL)
    long = [t for t in allocated if t.shape[:1] == call.x.shape[:1] and t.shape[-1:] == (HIDDEN,)]
    assert len(long) == 2  # y and dx
    assert len(allocated) == 2 + 3 + 4 + 1 + 1  # and z, dz, a, 4 gradients, their sums, d(scaling)


KINDS = {
    "plain": {},
    "more-tokens": {"tokens": 301},
    "no-skip": {"skip": None},
    "float16": {"dtype": torch.float16},
    "scale": {"scaling": None},
    "minus-zero": {"scaling": None, "scale": -0.0},
    "zero": {"scaling": None, "scale": 0.0},
    "beyond-float32": {"scaling": None, "scale": 1e39},
    "no-scale": {"scaling": None, "scale": 1.0},
    "scalar": {"channel": False},
    "relu": {"activation": "relu"},
    "strided": {"x": torch.zeros(300, 2 * HIDDEN, dtype=torch.bfloat16)[:, :HIDDEN]},
    "x-as-skip": {"x": torch.zeros(300, HIDDEN, dtype=torch.bfloat16), "skip": "x"},
    "transposed": {"x": torch.zeros(HIDDEN, 300, dtype=torch.bfloat16).T},
}


def sent(recorder, kind):
    """What the passes of a call send, with the names of tensors in place of their addresses."""
    changes = {"tokens": 300} | KINDS[kind]
    if changes.get("skip") == "x":
        changes["skip"] = changes["x"]
    call = make_call(**changes)
    outputs, saved = get("cuda").forward(call, save=True)
    named = call.tensors() | outputs._asdict() | saved._asdict()
    launches = described(recorder, named)
    upstream = Outputs(torch.zeros_like(outputs.y))
    gradients = get("cuda").backward(call.for_backward(ALL), saved, upstream, ALL)
    named |= {f"d_{n}": g for n, g in gradients._asdict().items() if n != "scaling"}
    return launches + described(recorder, {**named, "dy": upstream.y})


def described(recorder, named):
    """The launches so far; scratch memory is named by the order in which it is seen."""
    names = {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}
    names[0] = "nothing"
    fields = []
    for params, *queue in recorder.launches:
        for field, value in params._asdict().items():
            if isinstance(value, tuple):
                assert value[0] % 16 == 0
                value = (names.setdefault(value[0], f"scratch {len(names)}"), *value[1:])
            fields.append((field, str(value), *queue))
    recorder.launches.clear()
    return fields


def test_a_repeated_call_sends_what_the_first_one_sent(recorder, monkeypatch):
    """But for addresses, and whatever was sent between the two."""
    backend, ran = get("cuda"), []
    first = {}
    for kind in KINDS:
        backend._repeats.clear()
        first[kind] = sent(recorder, kind)
    assert len({str(fields) for fields in first.values()}) == len(KINDS)
    for name in ("_forward", "_backward"):
        code = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *args, code=code: ran.append(1) or code(*args))
    backend._repeats.clear()
    for _ in range(4):
        ran.clear()
        for kind in KINDS:
            assert sent(recorder, kind) == first[kind], kind
    assert len(ran) == 2  # both passes of the one kind that copies x first


def test_a_scale_that_changes_is_sent_anew_and_recorded_once(recorder):
    backend = get("cuda")
    backend._repeats.clear()
    for step in range(1, 40):
        backend.forward(make_call(300, scaling=None, scale=step + 0.5), save=False)
        assert recorder.launches[-1][0].scale == step + 0.5
    assert len(backend._repeats._known) == 1


def test_a_repeated_call_goes_to_the_stream_of_the_moment(recorder, monkeypatch):
    streams = []
    for stream in (6, 7, 8):
        monkeypatch.setattr(cuda_backend, "_stream", lambda device, at=stream: at)
        get("cuda").forward(make_call(300), save=False)
        streams.append(recorder.launches[-1][2])
    assert streams == [6, 7, 8]


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [torch.device("cuda", 1)])])
def test_a_launch_on_another_device_is_left_to_torch_to_return_from(monkeypatch, current, entered):
    """The runtime would make a context on the caller's device, which may have had none."""
    at, seen, launched = [current], [], []

    @contextlib.contextmanager
    def enter(device):
        seen.append(device)
        at.append(device.index)
        yield
        at.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[-1])
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(cuda_backend, "_stream", lambda _: 7)
    backend = CudaBackend(kernels=SimpleNamespace())
    backend._repeats = SimpleNamespace(run=lambda *given: launched.append((at[-1], *given)))
    inputs = (SimpleNamespace(device=torch.device("cuda", 1)),)
    backend._run(inputs, (), None, 0.5)
    assert launched == [(1, inputs, (), 7, None, 0.5)]
    assert (seen, at) == (entered, [current])


def a_part_of_a_gpu(monkeypatch, placed):
    """Make `_gpu` see a GPU of compute capability 9.0 that can place clusters of these sizes."""
    module = SimpleNamespace(
        shared_memory=lambda index: 227 * 1024,
        clusters=lambda index, size, threads, shared_bytes: int(size in placed),
    )
    monkeypatch.setattr(extension, "load", lambda: extension.Loaded(module, None))
    monkeypatch.setattr(extension, "runs_clusters", lambda major, minor: True)
    properties = SimpleNamespace(multi_processor_count=16, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return cuda_backend._gpu.__wrapped__(torch.device("cuda", 0))


@pytest.mark.parametrize(("asked", "specific"), [("0", True), ("1", False), ("1", True)])
def test_resident_form_is_asked_for_and_needs_its_code(monkeypatch, asked, specific):
    monkeypatch.setattr(_env, "CUDA_RESIDENT", asked)
    monkeypatch.setattr(extension, "code_for", lambda *_: "sm_90a" if specific else "sm_90")
    device = a_part_of_a_gpu(monkeypatch, {2, 4, 8})
    assert device.warpgroups == (asked == "1" and specific)
    plan = token_plan(Problem(1024, 1024, 64, True, beside=0), device)
    assert (plan.resident_clusters > 0) == device.warpgroups


def test_sizes_of_clusters_that_a_device_cannot_place_are_not_planned(monkeypatch):
    """A part of a GPU (MIG, MPS) may have room for none: a launch would fail."""
    problem = Problem(1024, 1024, 64, True)
    whole = a_part_of_a_gpu(monkeypatch, {2, 4, 8})
    assert token_plan(problem, whole).slices.number == 4
    assert token_plan(problem, a_part_of_a_gpu(monkeypatch, {8})).slices.number != 4
    none = a_part_of_a_gpu(monkeypatch, set())
    plan = token_plan(problem, none)
    assert (plan.num_clusters, plan.large_tiles) == (0, True)
