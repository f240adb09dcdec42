"""Memory of its own for each call of a graph: how much, and that calls compute with it."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from adapterkern.bench import measure, rotation
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.providers import PROVIDERS
from adapterkern.bench.rotation import FixedWeightsError
from adapterkern.bench.timing import WallTimer

H100 = SimpleNamespace(l2_bytes=50 * 2**20)  # of a timer


@pytest.mark.parametrize(
    ("case", "count", "least"),
    [
        # x and y of 16384 x 1024 x 2 B are 64 MiB: three of them exceed three L2s of 50 MiB.
        (BenchCase(1024, 64, 16384), 3, 20),
        (BenchCase(8192, 128, 65536), 1, 20),
        # 8 MiB and 258 KiB: 19 fill three L2s, and 125 calls move a gibibyte.
        (BenchCase(1024, 64, 2048), 19, 125),
        # 64 KiB and 258 KiB, most of them weights: 477 fill three L2s.
        (BenchCase(1024, 64, 16), 477, 128),
        (BenchCase(768, 48, 1), 512, 128),
    ],
)
def test_sets_fill_three_l2s_and_calls_outlast_their_launch(case, count, least):
    assert rotation.set_count(case, H100) == count
    assert rotation.set_count(case, WallTimer()) == 1
    assert rotation.least_calls(case) == least
    each = rotation.activation_bytes(case) + rotation.weight_bytes(case)
    assert count == 512 or count * each >= 3 * H100.l2_bytes


def test_a_larger_l2_takes_more_sets():
    larger = SimpleNamespace(l2_bytes=126 * 10**6)  # a B200
    assert rotation.set_count(BenchCase(1024, 64, 2048), larger) == 44


def test_bytes_are_those_of_the_tensors():
    case = BenchCase(48, 8, 33, "fp32", mode="step")
    inputs = case.draw("cpu")
    assert rotation.weight_bytes(case) == sum(t.nbytes for t in inputs.parameters.values())
    assert rotation.activation_bytes(case) == inputs.x.nbytes + inputs.dy.nbytes


def tensors(inputs):
    return [inputs.x, inputs.dy, *inputs.parameters.values()]


@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
def test_sets_are_copies_in_memory_of_their_own(mode):
    case = BenchCase(1024, 64, 2048, mode=mode)
    inputs = case.draw("cpu")
    found = rotation.sets(case, inputs, SimpleNamespace(l2_bytes=2**23))
    assert len(found) == 3
    assert found[0] is inputs
    for copy in found[1:]:
        for tensor, original in zip(tensors(copy), tensors(inputs), strict=True):
            assert torch.equal(tensor, original)
            shared = mode == "forward" and original is inputs.dy  # which no forward reads
            assert (tensor.data_ptr() == original.data_ptr()) == shared


def test_fewer_sets_are_taken_where_memory_runs_out(monkeypatch):
    case, made = BenchCase(1024, 64, 2048), []
    inputs, clone = case.draw("cpu"), Tensor.clone

    def limited(tensor):
        made.append(tensor)
        if len(made) > 8:  # the second copy's parameters
            raise torch.OutOfMemoryError("full")
        return clone(tensor)

    monkeypatch.setattr(Tensor, "clone", limited)
    assert len(rotation.sets(case, inputs, H100)) == 2


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
@pytest.mark.parametrize("name", ["reference", "plain", "addmm", "lora", "compile"])
def test_each_call_computes_with_the_weights_of_its_own_set(name, mode):
    case = BenchCase(24, 4, 10, "fp32", mode=mode)
    sets = [case.draw("cpu", seed=seed) for seed in range(3)]
    if name == "compile" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")
    if name == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
    torch.compiler.reset()  # also what other tests compiled of the same code
    counters.clear()
    built = PROVIDERS[name].build(case, sets[0])
    compiled = counters["stats"]["unique_graphs"]
    assert (compiled > 0) == (name == "compile")
    before = {key: (leaf, leaf.data_ptr()) for key, leaf in built.parameters.items()}
    calls = [measure.rotating_call(built, case, chosen) for chosen in sets]
    for chosen, call in [*zip(sets, calls, strict=True)] * 2:  # as in two rounds of a graph
        own = PROVIDERS[name if name != "compile" else "plain"].build(case, chosen)
        wanted = flat(measure.prepared_call(own, case, chosen.x, chosen.dy)())
        found = flat(call())
        assert len(found) == len(wanted) >= 1
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    after = {key: (leaf, leaf.data_ptr()) for key, leaf in built.parameters.items()}
    assert after == before
    assert counters["stats"]["unique_graphs"] == compiled  # nothing was compiled anew


def flat(result):
    if isinstance(result, Tensor):
        return [result.detach()]
    return [tensor for part in result for tensor in flat(part)]


def test_leaves_get_their_memory_back_when_a_call_fails():
    weight = nn.Parameter(torch.ones(2, 3))
    address, other = weight.data_ptr(), torch.zeros(2, 3)
    seen = []

    def fail():
        seen.append(weight.data_ptr())
        raise KeyError("odd")

    with pytest.raises(KeyError, match="odd"):
        rotation.with_weights(fail, {"w": weight}, {"w": other})()
    assert seen == [other.data_ptr()]
    assert weight.data_ptr() == address
    assert weight.detach().sum() == 6


@pytest.mark.parametrize(
    "values", [{}, {"w": torch.zeros(3, 2)}, {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}]
)
def test_a_leaf_takes_nothing_but_its_own_kind(values):
    weight = nn.Parameter(torch.ones(2, 3))
    wanted = r"its w is torch.float32 \[2, 3\], the case has"
    with pytest.raises(FixedWeightsError, match=wanted), rotation.exchanged({"w": weight}, values):
        raise AssertionError
    assert weight.detach().sum() == 6


def test_half_of_every_parameter_is_seen_in_every_result():
    case = BenchCase(24, 4, 10, "bf16", "relu", "step")
    inputs = case.draw("cpu")
    halved = rotation.halved(inputs)
    assert halved.x is inputs.x
    whole = measure.outputs_of(PROVIDERS["reference"].build(case, inputs), case, inputs)
    for name, tensor in inputs.parameters.items():
        assert torch.equal(halved.parameters[name] * 2, tensor)
        one = replace(inputs, parameters={**inputs.parameters, name: halved.parameters[name]})
        changed = measure.outputs_of(PROVIDERS["reference"].build(case, one), case, one)
        assert not torch.equal(changed["y"], whole["y"])
