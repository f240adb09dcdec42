"""Many adapters in graphs, which serve any batch: torch.compile, torch.export, torch.jit.trace."""

import pytest
import torch
from banks import bank_of, one_at_a_time, routed
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import adapterkern as ak

pytestmark = pytest.mark.usefixtures("recompiled")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = ["full", "narrow", None, "thin"]
BATCHES = [NAMES, ["narrow"] * 7, [None] * 5, NAMES * 3, ["thin", None]]


class Served(nn.Module):
    """A bank and its routing, which is updated in the graph too."""

    def __init__(self, bank):
        super().__init__()
        self.bank, self.routing = bank, ak.AdapterRouting(64, bank.slots)

    def forward(self, x, ids):
        return self.bank(x, self.routing.update(ids))


def test_compiled_bank_serves_other_ids_and_numbers_of_tokens_without_compiling_anew():
    bank, counter = bank_of(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bank, backend=counter, fullgraph=True)
    routing = ak.AdapterRouting(64, 5)
    for names in BATCHES:
        routing.update(bank.ids(names))
        x = torch.randn(len(names), 16)
        with torch.no_grad():
            y = compiled(x, routing)
        torch.testing.assert_close(y, one_at_a_time(bank, x, names), **CLOSE)
    assert counter.frame_count == 2  # of one number of tokens, then of any


def test_compiled_bank_with_a_dynamic_batch_compiles_once_for_any_content():
    bank, counter = bank_of(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bank, backend=counter, fullgraph=True)
    for names in BATCHES:
        x = torch.randn(len(names), 16)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            y = compiled(x, ak.AdapterRouting(64, 5).update(bank.ids(names)))
        torch.testing.assert_close(y, one_at_a_time(bank, x, names), **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_gives_the_gradients_of_eager_and_zeros_to_the_unused(backend):
    bank = bank_of({"narrow": 5, "full": 8}, slots=3, options={"scaling": "learned"})
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(bank, backend=counter, fullgraph=True)
    routing = ak.AdapterRouting(64, 3)
    for names in (["narrow", None, "full"], ["narrow"] * 7, [None] * 5, ["full"] * 2):
        routing.update(bank.ids(names))
        x = torch.randn(len(names), 16, requires_grad=True)
        bank.zero_grad()
        compiled(x, routing).square().sum().backward()
        found = {name: p.grad for name, p in bank.named_parameters()}
        dx, x.grad = x.grad, None
        bank.zero_grad()
        one_at_a_time(bank, x, names).square().sum().backward()
        torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-4)
        for name, parameter in bank.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_graphs_of_a_bank_hold_one_op_each_way():
    graphs = []

    def record(graph, _inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    bank, x = bank_of(), torch.randn(4, 16)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(bank, backend=backend, fullgraph=True)(x, routed(bank, NAMES)).sum().backward()
    forward, backward = graphs
    assert forward.count("adapterkern.grouped_forward.default") == 1
    assert backward.count("adapterkern.grouped_backward.default") == 1
    assert not [target for graph in graphs for target in graph if target.startswith("aten.mm")]


@pytest.mark.thorough
def test_compiled_bank_follows_a_scaling_and_an_adapter_that_is_added():
    bank, x = bank_of(), torch.randn(4, 16)
    compiled = torch.compile(bank, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x, routed(bank, NAMES))
        bank["narrow"].scaling = 0.25
        y = compiled(x, routed(bank, NAMES))
        torch.testing.assert_close(y, one_at_a_time(bank, x, NAMES), **CLOSE)
        bank.add("next", bank["narrow"].state_dict())
        names = ["next", "narrow", None, "full"]
        y = compiled(x, routed(bank, names))
        torch.testing.assert_close(y, one_at_a_time(bank, x, names), **CLOSE)


def test_compiled_function_and_update_equal_eager():
    bank = bank_of()
    served = Served(bank)
    compiled = torch.compile(served, backend="aot_eager", fullgraph=True, dynamic=True)
    for names in BATCHES:
        x = torch.randn(len(names), 16)
        y = compiled(x, bank.ids(names))
        torch.testing.assert_close(y, one_at_a_time(bank, x, names), **CLOSE)

    def function(x, routing):
        stacks = bank.down_weights, bank.up_weights
        return ak.grouped_bottleneck_adapter(x, *stacks, routing, ranks=bank.ranks)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x, routing = torch.randn(4, 16), routed(bank, NAMES)
    torch.testing.assert_close(compiled(x, routing), function(x, routing), **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_bank_in_plain_operations_serves_other_ids(strict):
    bank = bank_of(options={"scaling": "learned"})
    served, batch = Served(bank), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        served, (torch.randn(4, 16), bank.ids(NAMES)),
        dynamic_shapes=({0: batch}, {0: batch}), strict=strict,
    )  # fmt: skip
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert not [target for target in targets if "adapterkern" in target]
    for names in ([None, "full", "full", "thin", "narrow"], [None, None]):
        x = torch.randn(len(names), 16)
        y = program.module()(x, bank.ids(names))
        torch.testing.assert_close(y, one_at_a_time(bank, x, names), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_traced_bank_serves_other_ids():
    bank = bank_of()
    with torch.no_grad():
        traced = torch.jit.trace(Served(bank), (torch.randn(4, 16), bank.ids(NAMES)))
    names = ["thin", "full", None, "full"]
    x = torch.randn(4, 16)
    torch.testing.assert_close(traced(x, bank.ids(names)), one_at_a_time(bank, x, names), **CLOSE)
