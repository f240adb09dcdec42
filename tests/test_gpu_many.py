"""Many adapters in one batch, as only a CUDA device can show them: the routing's kernel, graphs
replayed with other ids, work that waits for nothing, large offsets.
"""

import pytest
import torch

import adapterkern as ak
from adapterkern import dispatch
from adapterkern.backends import NAMES, get
from adapterkern.grouped.call import OPERATION
from adapterkern.grouped.routing import sort_tokens
from adapterkern.parity import GroupedCase, check_case, differing_bits, grouped_cases, refusals
from adapterkern.testing import nan_filled_memory

pytestmark = pytest.mark.gpu

KERNELS = [n for n in NAMES if n != "reference" and OPERATION in get(n).operations]
TRAINED = [name for name in KERNELS if "gradient" in get(name).features]
ROUTERS = [name for name in NAMES if get(name).most_routed_slots]
HALF = torch.bfloat16
HIDDEN, UNITS, SLOTS = 768, 48, 5
# The first goes by row, the second in tiles.
TOKENS = (8, 1500)


def able(name):
    reason = get(name).unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(params=KERNELS)
def backend(request):
    return able(request.param)


@pytest.fixture(params=TRAINED)
def trained(request):
    return able(request.param)


@pytest.fixture(params=ROUTERS)
def router(request):
    return able(request.param)


def adapter_of(seed, units=UNITS):
    torch.manual_seed(seed)
    adapter = ak.BottleneckAdapter(HIDDEN, units, init="bert", dtype=HALF)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)
    return adapter


def bank_of(backend, names="abcd"):
    """A bank with a free slot, whose adapters differ in their units."""
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS, backend=backend, device="cuda", dtype=HALF)
    for seed, name in enumerate(names):
        bank.add(name, adapter_of(seed, UNITS - 7 * seed))
    return bank


def ids_of(tokens, seed=0, slots=SLOTS):
    """Slots at random, of which some are none, on the GPU: the host does not know them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, slots, (tokens,), generator=generator, dtype=torch.int32).cuda()


def rows_of(tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(tokens, HIDDEN, device="cuda", generator=generator).to(HALF)


def result_of(bank, x, ids):
    """y of a routing of its own, outside any graph."""
    routing = ak.AdapterRouting(len(ids), SLOTS, device="cuda")
    return bank(x, routing.update(ids))


def captured(work):
    """A graph of the work, after a run on a side stream as torch asks for, and what it returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def cases_of(name):
    kernels = get(name)
    found = grouped_cases(kernels.dtypes, kernels.activations, features=kernels.features)
    return [(name, case) for case in found]


@pytest.mark.parametrize(
    ("name", "case"), [pair for name in KERNELS for pair in cases_of(name)], ids=str
)
def test_many_adapters_match_float64(name, case):
    reasons = refusals(case, name, "cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    with nan_filled_memory():
        rows = check_case(case, name, "cuda")
    assert not [str(row) for row in rows if not row.passed]


def test_a_machine_with_a_gpu_runs_a_kernel_of_many_adapters():
    bank, x = bank_of("auto"), rows_of(8)
    routing = ak.AdapterRouting(8, SLOTS, device="cuda").update(ids_of(8))
    with torch.no_grad():
        assert dispatch.select(bank.as_call(x, routing), "auto").backend in KERNELS


@pytest.mark.parametrize("slots", [1, 3, 16, 127, 128, 300, 1022])
@pytest.mark.parametrize("tokens", [1, 63, 64, 257, 5000, 40000])
def test_the_kernel_routes_as_sort_tokens_does(router, tokens, slots):
    """All four buffers bit for bit, over what an earlier batch left; ids out of range are none."""
    ids = ids_of(tokens, slots=slots)
    ids[::17], ids[5::29] = slots + 3, -7
    spare = 100
    there = ak.AdapterRouting(tokens + spare, slots, device="cuda").buffers()
    here = ak.AdapterRouting(tokens + spare, slots, device="cpu").buffers()
    for number in (12345, -9):
        for buffer in there:
            buffer.fill_(number)
        get(router).route(ids, there)
        sort_tokens(ids.cpu(), slots, *here)
        for found, wanted in zip(there, here, strict=True):
            assert torch.equal(found.cpu(), wanted)


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("inside", [True, False], ids=["update-inside", "update-outside"])
def test_a_graph_replays_with_the_ids_of_another_batch(backend, tokens, inside):
    bank, x, ids = bank_of(backend), rows_of(tokens), ids_of(tokens)
    routing = ak.AdapterRouting(tokens, SLOTS, device="cuda").update(ids)

    def work():
        if inside:
            routing.update(ids)
        return bank(x, routing)

    graph, y = captured(work)
    for seed in (1, 2):
        x.copy_(rows_of(tokens, seed))
        ids.copy_(ids_of(tokens, seed))
        if not inside:
            routing.update(ids)
        graph.replay()
        assert torch.equal(y, result_of(bank, x, ids))
    ids.fill_(-1)
    if not inside:
        routing.update(ids)
    graph.replay()
    assert torch.equal(y, x)
    ids.fill_(3)  # one adapter takes all: as many tiles as there can be of it
    if not inside:
        routing.update(ids)
    graph.replay()
    assert torch.equal(y, result_of(bank, x, ids))
    assert not torch.equal(y, x)


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_graph_sees_adapters_that_were_added_and_removed(backend, tokens):
    bank, x, ids = bank_of(backend), rows_of(tokens), ids_of(tokens)
    ids[0], ids[1] = 1, 4  # of "b", and of the free slot
    routing = ak.AdapterRouting(tokens, SLOTS, device="cuda").update(ids)
    graph, y = captured(lambda: bank(x, routing))
    graph.replay()
    before = y.clone()
    assert torch.equal(before[ids == 4], x[ids == 4])
    with pytest.raises(ValueError, match="'b' is in use"):
        bank.remove("b")
    routing.update(torch.where(ids == 1, -1, ids))
    bank.remove("b")
    routing.update(ids)  # of a caller that has not heard of it
    graph.replay()
    assert torch.equal(y[ids == 1], x[ids == 1])
    assert torch.equal(y[ids != 1], before[ids != 1])
    bank.add("e", adapter_of(7, 9))  # into the slot that "b" had
    bank.add("f", adapter_of(8))
    graph.replay()
    assert torch.equal(y, result_of(bank, x, ids))
    for slot in (1, 4):
        assert not torch.equal(y[ids == slot], x[ids == slot])
    kept = (ids != 1) & (ids != 4)
    assert torch.equal(y[kept], before[kept])


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_step_replays_from_a_graph_with_other_ids(trained, tokens):
    """The stacked gradients of a batch whose adapters the host never learns."""
    tensors = stacks_of()
    x, ids, dy = rows_of(tokens).requires_grad_(), ids_of(tokens), rows_of(tokens, 9)
    routing = ak.AdapterRouting(tokens, SLOTS, device="cuda")
    leaves = [x, *tensors.values()]

    def step():
        routing.update(ids)
        y = ak.grouped_bottleneck_adapter(x, routing=routing, backend=trained, **tensors)
        return y, torch.autograd.grad(y, leaves, dy)

    graph, (y, found) = captured(step)
    ids.copy_(ids_of(tokens, 1, slots=3))  # none of the last two
    graph.replay()
    torch.cuda.synchronize()
    replayed = [y.detach().clone(), *(g.clone() for g in found)]
    wanted_y, wanted = step()
    for one, other in zip(replayed, (wanted_y, *wanted), strict=True):
        assert torch.equal(one, other)
    assert not replayed[2][3:].any()
    assert replayed[2][:3].any()


def stacks_of():
    generator = torch.Generator("cuda").manual_seed(3)
    shapes = {
        "down_weights": (SLOTS, UNITS, HIDDEN),
        "up_weights": (SLOTS, HIDDEN, UNITS),
        "down_biases": (SLOTS, UNITS),
        "up_biases": (SLOTS, HIDDEN),
    }
    return {
        name: (torch.randn(shape, device="cuda", generator=generator) * 0.1)
        .to(HALF)
        .requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("tokens", TOKENS)
def test_nothing_waits_for_the_device(backend, tokens):
    bank, x, ids = bank_of(backend), rows_of(tokens), ids_of(tokens)
    sequences, bounds = ids_of(2), torch.tensor([0, 3, tokens - 1], device="cuda")
    routing = ak.AdapterRouting(tokens, SLOTS, device="cuda")
    tensors = stacks_of() if backend in TRAINED else {}
    of_step = x.clone().requires_grad_()

    def work():
        with torch.no_grad():
            first = bank(x, routing.update(ids))
            ragged = bank(x, routing.update(sequences, cu_seqlens=bounds))
            whole = bank(x, routing.update(ids[:1], seq_len=tokens))
            named = bank(x, routing.update(torch.tensor([1], dtype=torch.int32), seq_len=tokens))
            on_host = torch.tensor([0, 3, tokens])
            lengths = bank(x, routing.update([1, -1], cu_seqlens=on_host))
        results = [first, ragged, whole, named, lengths]
        if tensors:
            y = ak.grouped_bottleneck_adapter(
                of_step, routing=routing.update(ids), backend=backend, **tensors
            )
            results += torch.autograd.grad(y, [of_step, *tensors.values()], x)
        return results

    wanted = work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert torch.equal(found[1][-1], x[-1])  # beyond the last sequence


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [16, 2048])
def test_fifty_runs_of_many_adapters_give_the_same_bits(backend, tokens, dtype):
    needs = None if backend in TRAINED else ()
    sizes = {"num_tokens": tokens, "hidden_size": 1024, "bottleneck_size": 64, "slots": 16}
    case = GroupedCase(dtype, needs=needs, **sizes)
    assert differing_bits(case, backend, "cuda", runs=50) == []


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_bits_of_a_token_do_not_depend_on_its_place(backend, tokens):
    bank, x, ids = bank_of(backend), rows_of(tokens), ids_of(tokens)
    order = torch.randperm(tokens, device="cuda")
    y = result_of(bank, x, ids)
    assert torch.equal(result_of(bank, x[order], ids[order]), y[order])


@torch.no_grad()
def test_stacks_survive_more_than_2_to_the_31_elements(backend):
    hidden, units = 4096, 64
    slots = 2**31 // (hidden * units) + 3
    free, _ = torch.cuda.mem_get_info()
    needed = 2 * slots * hidden * units * 2
    if free < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of GPU memory")
    down = torch.zeros(slots, units, hidden, device="cuda", dtype=HALF)
    up = torch.zeros(slots, hidden, units, device="cuda", dtype=HALF)
    last = slots - 1
    down[last].normal_(0, hidden**-0.5)
    up[last].normal_(0, 0.1)
    for tokens in (8, 1500):
        x = torch.randn(tokens, hidden, device="cuda").to(HALF)
        ids = torch.zeros(tokens, device="cuda", dtype=torch.int32)
        ids[::2] = last
        routing = ak.AdapterRouting(tokens, slots, device="cuda").update(ids)
        y = ak.grouped_bottleneck_adapter(x, down, up, routing, backend=backend)
        wanted = ak.bottleneck_adapter(x[::2], down[last], up[last], backend="reference")
        torch.testing.assert_close(y[::2], wanted, rtol=0.02, atol=0.02)
        assert torch.equal(y[1::2], x[1::2])


@torch.no_grad()
def test_no_tensor_of_the_size_of_x_is_made_to_sort(backend):
    tokens, slots = 16384, 16
    bank = ak.AdapterBank(1024, 64, slots, backend=backend, device="cuda", dtype=HALF)
    bank.add("a", ak.BottleneckAdapter(1024, 64, dtype=HALF))
    x = torch.randn(tokens, 1024, device="cuda", dtype=HALF)
    routing = ak.AdapterRouting(tokens, slots, device="cuda").update(ids_of(tokens, slots=slots))
    bank(x, routing)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bank(x, routing)
    torch.cuda.synchronize()
    of_y = 2 * tokens * 1024
    assert torch.cuda.max_memory_allocated() - before < 1.1 * of_y
