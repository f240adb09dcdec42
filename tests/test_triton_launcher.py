"""A repeated launch is the launch that `kernel[grid]` would be: the same compiled kernel, with the
same arguments in the same places.
"""

import gc
import inspect
import weakref
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from fake_gpu import FakeGpu, fake_gpu
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_calls import (
    COPIES,
    KINDS,
    LIKE_ANOTHER,
    OF_THE_SPLIT_FORM,
    ROW_BLOCK,
    SPLIT,
    parts,
    tensor,
)

from adapterkern.backends import get
from adapterkern.backends.triton import compile_only, forward, launcher, tuned
from adapterkern.backends.triton.launch_config import Device, LaunchConfig, Problem
from adapterkern.backends.triton.tuned import Entry
from adapterkern.results import Needs, Outputs
from adapterkern.spec import make_call

ALL = Needs(*[True] * 5, scaling=True)
SMALL = FakeGpu(device=Device(num_sms=1, shared_memory=227 * 1024))


def launched(gpu, given, save=True, needs=ALL):
    """The launches of both passes of a call, described; without `save` of the forward alone."""
    del gpu.launches[:]
    call = make_call(**given)
    outputs, saved = get("triton").forward(call, save)
    named = call.tensors() | outputs._asdict() | saved._asdict()
    launches = described(gpu, named)
    if save:
        upstream = Outputs(torch.zeros_like(outputs.y))
        gradients = get("triton").backward(call.for_backward(needs), saved, upstream, needs)
        named |= {f"d_{name}": gradient for name, gradient in gradients._asdict().items()}
        del named["d_scaling"]  # computed from what the launches wrote
        launches += described(gpu, {**named, "dy": upstream.y})
    return launches


def described(gpu, named):
    """The launches so far, with the names of tensors in place of their addresses. Scratch memory is
    named by the order in which it is seen.
    """
    names = {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}

    def describe(name, value):
        if name.endswith("_ptr") and value is not None:
            address = value.data_ptr() if torch.is_tensor(value) else value
            assert address % 16 == 0 or address in names
            return names.setdefault(address, f"scratch {len(names)}")
        return type(value), str(value)  # 1, 1.0 and True are three values, and so are 0.0 and -0.0

    launches = [
        (n.kernel, n.grid, n.cubin, {k: describe(k, v) for k, v in n.arguments.items()})
        for n in gpu.launches
    ]
    del gpu.launches[:]
    return launches


def both_passes(given):
    call = make_call(**given)
    outputs, saved = get("triton").forward(call, save=True)
    get("triton").backward(call, saved, Outputs(torch.zeros_like(outputs.y)), ALL)


class Counted:
    """How often Triton's own way to a launch was taken."""

    def __init__(self, monkeypatch):
        self.runs, ordinary = 0, JITFunction.run

        def counted(kernel, *args, **named):
            self.runs += 1
            return ordinary(kernel, *args, **named)

        monkeypatch.setattr(JITFunction, "run", counted)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [(ROW_BLOCK, KINDS), (SPLIT, OF_THE_SPLIT_FORM)],
    ids=["row-block", "split"],
)
def test_every_kind_of_call_launches_what_triton_would_launch(sizes, kinds, counted, monkeypatch):
    """Later rounds have seen every kind: what is taken for another shows."""
    with fake_gpu(replace(SMALL)) as gpu:
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "is_plain", lambda: False)
            ordinary = {kind: launched(gpu, KINDS[kind](*sizes)) for kind in kinds}
        different = len({*kinds} - LIKE_ANOTHER)
        assert len({str(launches) for launches in ordinary.values()}) == different
        for _ in range(4):
            runs = {}
            for kind in kinds:
                counted.runs = 0
                assert launched(gpu, KINDS[kind](*sizes)) == ordinary[kind], kind
                runs[kind] = counted.runs
    assert {kind for kind, count in runs.items() if count} == COPIES & {*kinds}


@pytest.mark.parametrize("sizes", [ROW_BLOCK, SPLIT], ids=["row-block", "split"])
def test_a_scale_that_changes_is_recorded_once(sizes, counted):
    with fake_gpu(replace(SMALL)):
        launcher.forget()
        for step in range(1, 20):
            if step == 4:
                counted.runs = 0
            both_passes(parts(*sizes, scaling=step + 0.5))
        assert counted.runs == 0
        assert len(launcher._repeats._known) == 2


@pytest.mark.parametrize("sizes", [ROW_BLOCK, SPLIT], ids=["row-block", "split"])
def test_what_is_saved_and_asked_for_is_told_apart(sizes, counted, monkeypatch):
    given = parts(*sizes, scaling=tensor(1))
    asked = [{"save": False}, {}, *({"needs": needs} for needs in subsets())]
    with fake_gpu(replace(SMALL)) as gpu:
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "is_plain", lambda: False)
            ordinary = [launched(gpu, given, **options) for options in asked]
        for _ in range(3):
            counted.runs = 0
            assert [launched(gpu, given, **options) for options in asked] == ordinary
    assert counted.runs == 0


def subsets():
    names = ("x", "down_weight", "up_weight", "down_bias", "up_bias", "scaling")
    return [Needs(**{name: True}) for name in names] + [ALL._replace(**{n: False}) for n in names]


def test_the_precision_of_float32_products_is_that_of_the_moment(counted):
    given = parts(*SPLIT, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    seen = []
    with fake_gpu(replace(SMALL)) as gpu:
        try:
            for precision in ("highest", "high", "highest", "high"):
                torch.set_float32_matmul_precision(precision)
                both_passes(given)
                seen.append({a["PRECISION"] for a in arguments_of(gpu) if "PRECISION" in a})
                del gpu.launches[:]
        finally:
            torch.set_float32_matmul_precision(before)
    assert seen == [{"ieee"}, {"tf32"}, {"ieee"}, {"tf32"}]


def arguments_of(gpu):
    return [launch.arguments for launch in gpu.launches]


def test_forced_and_new_plans_take_effect_at_once(monkeypatch, counted):
    given, problem = parts(*ROW_BLOCK), Problem(*ROW_BLOCK, False, False)
    entry = Entry(problem, "row_block", (LaunchConfig(32, 32, 16, 4, 2),))
    with fake_gpu(replace(SMALL)) as gpu:

        def block_t():
            del gpu.launches[:]
            get("triton").forward(make_call(**given), False)
            return gpu.launches[0].arguments["BLOCK_T"]

        first = block_t()
        assert [block_t() for _ in range(3)] == [first] * 3
        assert first != 32
        with tuned.forced(entry):
            assert [block_t() for _ in range(3)] == [32] * 3
        assert block_t() == first
        monkeypatch.setattr(tuned, "tables_for", lambda device: [[entry]])
        tuned._look_up.cache_clear()
        tuned._plans_changed()
        assert block_t() == 32
    tuned._look_up.cache_clear()


def test_a_new_search_is_read_at_once():
    before = tuned.generation
    tuned.clear_caches()
    assert tuned.generation > before


def test_another_gpu_gets_its_own_kernels():
    given = parts(*ROW_BLOCK)
    for capability in (90, 80, 90):
        with fake_gpu(replace(SMALL, capability=capability)) as gpu:
            for _ in range(3):
                both_passes(given)
        assert architectures(gpu) == {capability}


def architectures(gpu):
    return {arch for arch in (80, 90) for n in gpu.launches if f"sm_{arch}".encode() in n.cubin}


def test_a_gpu_in_the_place_of_another_gets_its_own_kernels():
    given = parts(*ROW_BLOCK)
    with fake_gpu(replace(SMALL)) as outer:
        for _ in range(3):
            both_passes(given)
        with fake_gpu(replace(SMALL, capability=80)) as inner:
            both_passes(given)
        both_passes(given)
    assert (architectures(outer), architectures(inner)) == ({90}, {80})
    assert len(outer.launches) == 4 * len(inner.launches)


def test_a_stand_in_is_forgotten_with_what_it_recorded():
    """Its launches hold their tensors."""
    with fake_gpu(replace(SMALL)) as gpu:
        given = parts(*ROW_BLOCK)
        for _ in range(3):
            both_passes(given)
    x = weakref.ref(given["x"])
    del given, gpu
    gc.collect()
    assert x() is None


@pytest.fixture
def at_stream(monkeypatch):
    """Sets the current stream; lists those of the launches."""
    current, seen = [0], []
    made = compile_only._StandIn.launcher_cls

    def launcher_cls(stand_in, source, metadata):
        launch = made(stand_in, source, metadata)

        def noted(x, y, z, stream, *rest):
            seen.append(stream)
            launch(x, y, z, stream, *rest)

        return noted

    monkeypatch.setattr(compile_only._StandIn, "launcher_cls", launcher_cls)
    monkeypatch.setattr(compile_only._StandIn, "get_current_stream", lambda *_: current[0])
    return current, seen


def test_a_launch_goes_to_the_stream_of_the_moment(at_stream):
    current, seen = at_stream
    given = parts(*ROW_BLOCK)
    with fake_gpu(FakeGpu(device=Device(2, 227 * 1024))):  # kernels of its own: not loaded before
        for current[0] in (7, 7, 7, 8):
            get("triton").forward(make_call(**given), False)
    each = len(seen) // 4
    assert each > 0
    assert seen == [7] * 3 * each + [8] * each


SETTINGS = {
    "debug": (knobs.runtime, "debug", True),
    "instrumentation": (knobs.compilation, "instrumentation_mode", "consan"),
    "stages": (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash")),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_triton_s_takes_its_own_way(setting, monkeypatch):
    room, name, value = SETTINGS[setting]
    if not hasattr(room, name):
        pytest.skip(f"this Triton has no {name}")
    assert launcher.is_plain()
    monkeypatch.setattr(room, name, value)
    assert not launcher.is_plain()


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("added", [True, False], ids=["added", "set"])
def test_a_hook_is_called_at_every_launch(name, added, counted, monkeypatch):
    given, calls = parts(*ROW_BLOCK), []
    with fake_gpu(replace(SMALL)) as gpu:
        for _ in range(2):
            get("triton").forward(make_call(**given), False)
        counted.runs = 0
        hook = getattr(knobs.runtime, name)
        with monkeypatch.context() as patch:
            if added:
                hook.add(calls.append)
            else:
                patch.setattr(knobs.runtime, name, calls.append)
            get("triton").forward(make_call(**given), False)
            if added:
                hook.remove(calls.append)
        assert counted.runs == 1
        get("triton").forward(make_call(**given), False)
        assert counted.runs == 1
    assert len(gpu.launches) == 4


class Listing:
    """A hook with an attribute of the name that Triton's chain of hooks has."""

    def __init__(self):
        self.calls = []

    def __call__(self, metadata):
        self.calls.append(metadata)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_that_lists_its_calls_is_no_empty_chain(name, monkeypatch):
    monkeypatch.setattr(knobs.runtime, name, Listing())
    assert not launcher.is_plain()


def test_a_hook_before_a_kernel_s_runs_is_called_each_time():
    kernel, calls = forward.bottleneck_fwd_kernel, []
    given = parts(*ROW_BLOCK)
    with fake_gpu(replace(SMALL)):
        for _ in range(2):
            get("triton").forward(make_call(**given), False)
        kernel.add_pre_run_hook(lambda *args, **named: calls.append(named["BLOCK_T"]))
        try:
            for _ in range(2):
                get("triton").forward(make_call(**given), False)
        finally:
            kernel.pre_run_hooks.clear()
    assert len(calls) == 2


def test_a_kernel_that_triton_forgets_stays_loaded():
    """Triton 3.9 unloads a kernel's module with the last reference to it."""
    given, kernel = parts(*ROW_BLOCK), forward.bottleneck_fwd_kernel
    with fake_gpu(replace(SMALL)) as gpu:
        for _ in range(2):
            get("triton").forward(make_call(**given), False)
        (cache, *_) = kernel.device_caches[driver.active.get_current_device()]
        compiled = [weakref.ref(binary) for binary in cache.values()]
        assert compiled
        del cache
        kernel.device_caches.clear()
        gc.collect()
        assert any(binary() is not None for binary in compiled)
        get("triton").forward(make_call(**given), False)
    assert len({launch.cubin for launch in gpu.launches}) == 1


def test_this_triton_s_launches_are_known():
    assert launcher.PROBLEM is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kernel.packed_metadata, launch_metadata", "launch_metadata, kernel.packed_metadata"),
        ("knobs.runtime.launch_exit_hook", "None"),
        ("knobs.runtime.debug", "knobs.runtime.debug or knobs.runtime.something_new"),
    ],
)
def test_an_unknown_triton_takes_its_own_way_and_tells_why(old, new, counted, monkeypatch):
    source = inspect.getsource(forward.bottleneck_fwd_kernel.__class__)
    source = source[source.index("    def run(") : source.index("    def repr(")]
    assert launcher.layout_problem(source) is None
    changed = source.replace(old, new)
    assert changed != source
    problem = launcher.layout_problem(changed)
    assert "launches kernels in another way" in problem
    monkeypatch.setattr(launcher, "PROBLEM", problem)
    with fake_gpu(replace(SMALL)) as gpu:
        for _ in range(2):
            get("triton").forward(make_call(**parts(*ROW_BLOCK)), False)
    assert counted.runs == len(gpu.launches) == 2


def test_an_unknown_triton_has_a_reason_without_its_source():
    assert "launches kernels in another way" in launcher.layout_problem("")


@triton.jit
def add_kernel(x_ptr, y_ptr, size, extra=2.0, BLOCK: tl.constexpr = 16):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size)
    tl.store(y_ptr + index, x + extra, mask=index < size)


def test_arguments_by_name_and_by_default_come_to_their_places(counted):
    def code(recording):
        y = recording.own(torch.empty_like(x))
        recording.launch(add_kernel, (3,), x, size=40, y_ptr=y, num_warps=2)
        return (y,)

    with fake_gpu(replace(SMALL)) as gpu:
        for _ in range(3):
            x = tensor(40)
            (y,) = launcher.run((x,), (), code)
            launch = described(gpu, {"x": x, "y": y})[0]
            assert (launch[0], launch[1]) == ("add_kernel", (3, 1, 1))
            assert launch[3] == {
                "x_ptr": "x",
                "y_ptr": "y",
                "size": (int, "40"),
                "extra": (float, "2.0"),
                "BLOCK": (int, "16"),
            }
    assert counted.runs == 2
