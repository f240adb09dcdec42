"""Many adapters in the CUDA backend: what it declines, how it plans, what it launches."""

import itertools
import re
import struct
from itertools import islice
from pathlib import Path

import cuda_sass
import pytest
import torch

import adapterkern as ak
from adapterkern.backends import _loaded
from adapterkern.backends.cuda import grouped
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.grouped import GroupedPlan, grouped_plan, tile_facts
from adapterkern.backends.cuda.launch_config import Slices
from adapterkern.backends.cuda.params import GROUPED_FORWARD, GroupedForwardParams, view
from adapterkern.grouped.call import TILE, GroupedCall, make_grouped_call, num_tiles

H100, A100 = Device(132, 227 * 1024, 227 * 1024), Device(108, memory=163 * 1024)
SMALL = Device(46)
HIDDEN, UNITS, SLOTS = 256, 48, 6
SOURCES = Path(__file__).resolve().parent.parent / "csrc"


class Recorder:
    """Stands in for the extension: keeps what each launch got."""

    def __init__(self) -> None:
        self.launches: list[GroupedForwardParams] = []

    def grouped_forward(self, packed: bytes, device: int, stream: int) -> None:
        assert (device, stream) == (0, 0)  # the queue of CPU tensors
        words = iter(struct.unpack(f"={len(packed) // 8}q", packed))
        kinds = GroupedForwardParams.__annotations__.values()
        fields = [next(words) if kind is int else tuple(islice(words, 3)) for kind in kinds]
        self.launches.append(GroupedForwardParams(*fields))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def draw(tokens: int, dtype=torch.bfloat16, **changes) -> GroupedCall:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    given = {
        "x": zeros(tokens, HIDDEN),
        "down_weights": zeros(SLOTS, UNITS, HIDDEN),
        "up_weights": zeros(SLOTS, HIDDEN, UNITS),
        "down_biases": zeros(SLOTS, UNITS),
        "up_biases": zeros(SLOTS, HIDDEN),
        "residual": "input",
        "skip": zeros(tokens, HIDDEN),
        "scalings": torch.ones(SLOTS),
        "ranks": torch.full((SLOTS,), 7, dtype=torch.int32),
        "routing": ak.AdapterRouting(tokens, SLOTS).update([0] * tokens).buffers(),
        "activation": "silu",
        "gradient": False,
    }
    return make_grouped_call(**(given | changes))


def test_a_launch_of_tiles_gets_every_tensor_by_its_name(recorder):
    call = draw(500)
    y, z = CudaBackend(recorder, H100).grouped_forward(call, True)
    (params,) = recorder.launches
    for name in ("x", "down_weights", "up_weights", "down_biases", "up_biases", "skip", "scalings"):
        assert getattr(params, name) == view(getattr(call, name)), name
    for name in ("ranks", "token_slots", "order", "tiles"):
        assert getattr(params, name) == (getattr(call, name).data_ptr(), 0, 0), name
    assert (params.y, params.z) == (view(y), view(z))
    assert (params.residual, params.partial) == (view(None), view(None))
    assert (params.num_tokens, params.hidden_size, params.bottleneck_size) == (500, HIDDEN, UNITS)
    assert (params.slots, params.activation, params.compute_dtype, params.add_input) == (6, 3, 2, 1)
    assert (params.down_slot_stride, params.up_slot_stride) == (UNITS * HIDDEN,) * 2
    assert (params.num_tiles, params.num_splits) == (num_tiles(500, SLOTS), 0)
    assert params.shared_bytes >= tile_facts(Problem(500, HIDDEN, UNITS, True)).least_bytes


def test_a_launch_of_rows_gets_slices_and_their_work_space(recorder):
    call = draw(33, residual=None, skip=None)
    y, z = CudaBackend(recorder, H100).grouped_forward(call, False)
    (params,) = recorder.launches
    assert z is None
    assert (params.num_tiles, params.num_splits, params.features_per_split) == (0, 2, 128)
    assert (params.z, params.skip, params.add_input) == (view(None), view(None), 0)
    assert params.partial[0] not in (0, params.y[0])
    assert y.shape == (33, HIDDEN)


def test_rows_of_a_stack_may_lie_apart_and_gaps_within_them_are_copied(recorder):
    room = torch.zeros(2 * SLOTS, 2 * UNITS, HIDDEN, dtype=torch.bfloat16)
    call = draw(500, down_weights=room[::2, :UNITS], up_weights=room[::2, :UNITS].mT)
    CudaBackend(recorder, H100).grouped_forward(call, False)
    (params,) = recorder.launches
    assert params.down_weights == (room.data_ptr(), 2, HIDDEN)
    assert params.down_slot_stride == 4 * UNITS * HIDDEN
    assert params.up_weights[0] != room.data_ptr()
    assert (params.up_weights[2], params.up_slot_stride) == (UNITS, UNITS * HIDDEN)


def test_later_calls_repeat_the_launch_without_the_host_work(recorder, monkeypatch):
    cuda = CudaBackend(recorder, H100)
    for _ in range(2):
        cuda.grouped_forward(draw(500), True)
    monkeypatch.setattr(grouped, "forward", None)
    call = draw(500)
    y, z = cuda.grouped_forward(call, True)
    first, _, last = recorder.launches
    assert (last.x, last.order[0]) == (view(call.x), call.order.data_ptr())
    assert (last.y, last.z) == (view(y), view(z))
    assert last[-9:] == first[-9:]
    assert GROUPED_FORWARD.size == 8 * (13 + 3 * 15)


def test_a_call_without_tokens_launches_nothing(recorder):
    y, z = CudaBackend(recorder, H100).grouped_forward(
        draw(0 + 1)._replace(x=torch.empty(0, 256)), True
    )
    assert (y.shape, z.shape, recorder.launches) == ((0, 256), (0, UNITS), [])


@pytest.mark.parametrize("device", [H100, A100, SMALL], ids=["H100", "A100", "99 KB"])
def test_plans_cover_h_and_fit_the_device(device):
    sizes = itertools.product((1, 16, 100, 133, 4096), (8, 130, 768, 4096, 20000), (1, 33, 250))
    for (tokens, hidden, units), half, added in itertools.product(sizes, (True, False), (0, 1, 4)):
        plan = grouped_plan(Problem(tokens, hidden, units, half, added), 16, device)
        if tokens > device.num_sms:
            fact = tile_facts(Problem(tokens, hidden, units, half))
            assert plan.num_tiles == num_tiles(tokens, 16)
            assert plan.slices.number == 0
            assert fact.least_bytes <= plan.shared_bytes <= device.block_memory
            continue
        number, length = plan.slices
        assert plan.num_tiles == 0
        assert number * length >= hidden > (number - 1) * length
        assert length % 8 == 0
        assert 4 * (256 + length) <= 48 * 1024


@pytest.mark.parametrize(
    ("tokens", "hidden", "plan"),
    [
        (1, 1024, GroupedPlan(slices=Slices(8, 128))),
        (32, 4096, GroupedPlan(slices=Slices(16, 256))),
        (132, 4096, GroupedPlan(slices=Slices(4, 1024))),
        (16384, 1024, GroupedPlan(272, shared_bytes=76800)),
    ],
)
def test_plans_are_those_that_were_worked_out(tokens, hidden, plan):
    assert grouped_plan(Problem(tokens, hidden, 64, half=True), 16, H100) == plan


def test_tiles_are_those_of_the_routing_and_as_narrow_as_r_allows():
    (tokens,) = re.findall(r"kTileTokens = (\d+);", (SOURCES / "row_block.cuh").read_text())
    assert int(tokens) == TILE
    widths = {half: [] for half in (True, False)}
    for half, units in itertools.product(widths, (1, 64, 65, 128, 129, 256)):
        fact = tile_facts(Problem(1, 64, units, half))
        assert TILE % fact.tokens == 0
        widths[half].append(fact.width)
    assert widths == {True: [64, 64, 128, 128, 256, 256], False: [64, 64, 256, 256, 256, 256]}


def test_a_named_backend_refuses_a_gradient_and_says_which_one_trains(monkeypatch, recorder):
    monkeypatch.setitem(_loaded, "cuda", CudaBackend(recorder, H100))
    call = draw(500, dtype=torch.float32)
    routing = ak.AdapterRouting(500, SLOTS).update([0] * 500)
    arguments = call.x.requires_grad_(), call.down_weights, call.up_weights, routing
    with pytest.raises(ak.BackendUnsupportedError) as refused:
        ak.grouped_bottleneck_adapter(*arguments, backend="cuda")
    assert 'feature "gradient" is not implemented' in str(refused.value)
    assert "in inference alone; the Triton backend trains them" in str(refused.value)
    with torch.no_grad():
        ak.grouped_bottleneck_adapter(*arguments, backend="cuda")
    assert len(recorder.launches) == 1


def test_limits_are_those_of_one_adapter(recorder):
    wide = torch.zeros(SLOTS, 257, HIDDEN)
    call = draw(
        500,
        dtype=torch.float32,
        down_weights=wide,
        up_weights=wide.mT,
        down_biases=None,
        ranks=None,
    )
    reasons = CudaBackend(recorder, H100).unsupported_reasons(call.spec())
    assert reasons == ["bottleneck_size 257 exceeds 256, the widest that stays on chip"]


@pytest.mark.thorough
@pytest.mark.parametrize("arch", cuda_sass.ARCHS)
def test_rows_have_their_loads_of_a_weight_under_way_together(arch):
    found = {n: code for n, code in cuda_sass.sass(arch).items() if "grouped_rows" in n}
    assert len(found) == 6
    for name, code in found.items():
        assert cuda_sass.most_in_flight(code) >= 4, name
        assert cuda_sass.resources()[arch][name]["REG"] <= 64, name
