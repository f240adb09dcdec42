"""How the CUDA backend plans a norm, and what it hands its extension."""

import itertools
import re
import struct
from pathlib import Path

import pytest
import torch

from adapterkern.backends.cuda import launch_config, norm, traffic
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.launch_config import CLUSTER_SIZES, cdiv
from adapterkern.backends.cuda.params import BACKWARD, FORWARD, ForwardParams
from adapterkern.results import Needs, Outputs
from adapterkern.spec import make_call, tensor_values, with_norm

MEMORY = 227 * 1024  # of a block, on compute capability 9.0 and 10.0
DEVICES = [
    Device(132, MEMORY),
    Device(2, MEMORY),
    Device(148, MEMORY),
    Device(16, MEMORY, cluster_sizes=(2,)),
    Device(24, MEMORY, cluster_sizes=(2, 4)),
]
SOURCE = (Path(__file__).resolve().parent.parent / "csrc" / "norm_gradients.cu").read_text()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_norm_plans_are_clusters_that_hold_every_row_and_fit(device):
    sizes = itertools.product((1, 17, 130, 4096, 1 << 20), (8, 64, 136, 768, 1024), (1, 32, 64))
    for problem in itertools.starmap(lambda *s: Problem(*s, half=True), sizes):
        plan = norm.norm_plan(problem, device)
        fact = launch_config.facts().cluster(problem, plan.cluster_tokens)
        number, length = plan.slices
        assert number in (device.cluster_sizes or CLUSTER_SIZES)
        assert number * length >= problem.hidden_size
        assert 0 < plan.num_clusters * number <= max(device.num_sms, number)
        bytes_of_norm = length // 64 * 512 + 8 * plan.cluster_tokens * 8
        assert fact.bytes_for(length, norm=True) == fact.bytes_for(length) + bytes_of_norm
        assert fact.bytes_for(length, norm=True) <= MEMORY


@pytest.mark.parametrize(
    ("tokens", "hidden", "bottleneck", "plan"),
    [
        (16384, 1024, 64, (4, 64)),
        (8192, 768, 48, (4, 64)),
        (4096, 4096, 64, (8, 16)),
        (37, 1024, 64, (8, 16)),
        (1, 64, 16, (2, 16)),
    ],
)
def test_norm_plans_are_those_that_were_worked_out(tokens, hidden, bottleneck, plan):
    found = norm.norm_plan(Problem(tokens, hidden, bottleneck, half=True), DEVICES[0])
    assert (found.slices.number, found.cluster_tokens) == plan


def test_norm_moves_no_more_than_a_fused_add_and_norm():
    """In passes over [T, H]: x, skip and normed; in training the stream too. Its backward reads the
    gradient and the stream and writes the gradient of the sum."""
    problem = Problem(16384, 1024, 64, half=True, added=2)
    device, rows = DEVICES[0], 16384 * 1024 * 2
    plan = norm.norm_plan(problem, device)
    weights, z = 2 * 1024 * 64 * 2, 16384 * 64 * 2
    (inference,) = traffic.norm_forward(problem, plan, device, save=False)
    (training,) = traffic.norm_forward(problem, plan, device)
    assert inference.memory == 3 * rows + weights
    assert training.memory == 4 * rows + weights + z
    of_rows, total = traffic.norm_gradients(problem, device)
    assert of_rows.memory == 3 * rows
    assert of_rows.stores - rows == total.loads == 2 * 264 * 1024 * 4
    (frozen,) = traffic.norm_gradients(problem, device, stream=True, parameters=False)
    assert (frozen.memory, frozen.stores) == (4 * rows, rows)


@pytest.mark.parametrize(("units", "widest"), [(32, 6144), (64, 4096), (128, 2048)])
def test_clusters_hold_the_widths_that_the_docs_name(units, widest):
    found = []
    for hidden in range(1024, 8193, 1024):
        vector = torch.zeros(hidden, dtype=torch.bfloat16)
        weight = vector.expand(units, hidden)
        call = make_call(vector.expand(2, hidden), weight, weight.T)
        call = with_norm(call, vector, vector, "layer", 1e-5, 0.0, False, False)
        if not norm.declined(call.spec(), DEVICES[0]):
            found.append(hidden)
    assert found == [*range(1024, widest + 1, 1024)]


def test_rows_share_blocks_as_the_kernel_has_it():
    for name, value in (("kNormThreads", norm.ROW_THREADS), ("kMostNormThreads", 768)):
        assert re.search(rf"\b{name} = (\d+)", SOURCE)[1] == str(value)
    assert norm.MOST_ROW_THREADS == 768
    for hidden, rows in ((8, 12), (256, 12), (264, 6), (1024, 3), (3072, 1), (6144, 1)):
        assert norm.row_blocks(100, hidden, Device(1000)) == cdiv(100, rows)
    assert norm.row_blocks(1 << 20, 1024, Device(132)) == 264


def test_whole_rows_copies_only_what_cannot_be_copied_in_sixteen_bytes():
    rows = torch.arange(64, dtype=torch.bfloat16).reshape(4, 16)
    for whole in (rows, rows[:, 8:], rows[::2], rows[:1].expand(4, 16), rows[:, :8]):
        assert norm.whole_rows(whole).data_ptr() == whole.data_ptr()
    for other in (
        rows[:, 1:9],
        rows.reshape(8, 8).T,
        torch.zeros(4, 12, dtype=torch.bfloat16)[:, :8],
    ):
        copy = norm.whole_rows(other)
        assert torch.equal(copy, other)
        assert copy.data_ptr() != other.data_ptr()
        assert copy.data_ptr() % 16 == copy.stride(0) * 2 % 16 == 0
    for gapped in (rows[:, 8:], rows[::2], rows[:1].expand(4, 16)):
        assert norm.whole_rows(gapped, gaps=False).is_contiguous()
    assert norm.whole_rows(rows, gaps=False).data_ptr() == rows.data_ptr()
    assert norm.whole_rows(None) is None


class Recorder:
    """Stands in for the extension: keeps the bytes of each launch."""

    def __init__(self) -> None:
        self.launches: list[bytes] = []

    def forward(self, packed: bytes, device: int, stream: int) -> None:
        self.launches.append(packed)

    backward = forward


def test_a_call_with_a_norm_is_recorded_and_repeated(monkeypatch):
    """Also with a scale, beside which no other float may be in a launch."""
    recorder = Recorder()
    backend = CudaBackend(recorder, Device(132, MEMORY))
    x = torch.zeros(40, 256, dtype=torch.bfloat16)
    weight, vector = torch.zeros(256, 16, dtype=torch.bfloat16), torch.zeros(256)
    call = make_call(x, weight.T.contiguous(), weight, skip=x + 1, scaling=0.3)
    call = with_norm(call, vector, vector, "layer", 1e-6, 1.0, True, False)
    needs = Needs(*(tensor is not None for tensor in tensor_values(call)))
    d_normed = torch.zeros(40, 256)

    def run():
        outputs, saved = backend.forward(call, save=True)
        saved = saved._replace(stream=outputs.y)
        return backend.backward(call, saved, Outputs(None, d_normed), needs)

    first = run()
    run()
    monkeypatch.setattr(backend, "_forward", None)
    monkeypatch.setattr(backend, "_backward", None)
    again = run()
    assert [None if g is None else g.shape for g in first] == [
        None if g is None else g.shape for g in again
    ]
    kinds = [FORWARD.size, BACKWARD.size]
    assert [len(packed) for packed in recorder.launches] == 3 * kinds
    names = list(ForwardParams._fields)
    fields = dict(zip(names[::-1], FORWARD.unpack(recorder.launches[0])[::-1], strict=False))
    assert fields["norm"] == fields["cast_before_weight"] == 1
    bits = fields["eps"], fields["weight_offset"]
    assert struct.unpack("f4xf4x", struct.pack("qq", *bits)) == pytest.approx((1e-6, 1.0))
    constants = [FORWARD.unpack(packed)[-15:] for packed in recorder.launches[::2]]
    assert constants[0] == constants[1] == constants[2]
