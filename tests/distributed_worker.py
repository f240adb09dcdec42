"""Runs in each of two gloo processes for test_distributed.py; rank 0 writes the results."""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from eager import EagerAdapter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import adapterkern as ak
from adapterkern import dispatch

HIDDEN, BOTTLENECK, BATCH, STEPS = 16, 4, 8, 3


def model_of(eager=False):
    """Frozen layer, adapter, frozen adapter, layer norm, adapter: gradients must pass it all."""
    torch.manual_seed(0)

    def adapter():
        ours = ak.BottleneckAdapter(HIDDEN, BOTTLENECK, init="houlsby")
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_(std=0.3)
        if not eager:
            return ours
        plain = EagerAdapter(HIDDEN, BOTTLENECK)
        plain.load_state_dict(ours.state_dict())
        return plain

    model = nn.Sequential(
        nn.Linear(HIDDEN, HIDDEN), adapter(), adapter(), nn.LayerNorm(HIDDEN), adapter()
    )
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, BATCH, HIDDEN, generator=generator)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, rank):
    """Return weights and first gradients after a few steps; `rank` None: all in one process."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    first = None
    for step in range(STEPS):
        x, target = data(step)
        if rank is not None:
            half = BATCH // dist.get_world_size()
            x, target = (t[rank * half : (rank + 1) * half] for t in (x, target))
        loss = (model(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        first = first or [full(p.grad).clone() for p in trained]
        optimizer.step()
    return [full(p).detach().clone() for p in trained], first


def largest_difference(some, others):
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def ddp(rank):
    weights, gradients = train(DistributedDataParallel(model_of()), rank)
    expected_weights, expected_gradients = train(model_of(), None)
    return {
        "weights": largest_difference(weights, expected_weights),
        "gradients": largest_difference(gradients, expected_gradients),
        "size": largest_difference(expected_gradients, [torch.zeros(())] * len(gradients)),
    }


def sharded(model, **options):
    for module in model:
        if isinstance(module, ak.BottleneckAdapter | EagerAdapter):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def fsdp(rank):
    weights, gradients = train(sharded(model_of()), rank)
    expected_weights, expected_gradients = train(model_of(), None)
    return {
        "weights": largest_difference(weights, expected_weights),
        "gradients": largest_difference(gradients, expected_gradients),
    }


def fsdp_bf16(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(model_of(), mp_policy=policy)
    stored = {str(p.dtype) for p in model.parameters()}
    _, gradients = train(model, rank)
    _, of_eager = train(sharded(model_of(eager=True), mp_policy=policy), rank)
    _, in_float32 = train(model_of(), None)
    return {
        "stored": stored,
        "output": str(model(data(0)[0]).dtype),
        "ours": largest_difference(gradients, in_float32),
        "eager": largest_difference(of_eager, in_float32),
    }


def first_fsdp_from_meta(rank):
    """The older FSDP materialises a model from the meta device module by module."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), ak.BottleneckAdapter(HIDDEN, BOTTLENECK))
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    x = data(0)[0]
    with FullyShardedDataParallel.summon_full_params(sharded):
        started = sharded.module
        return {
            "identity": torch.equal(started(x), started[0](x)),
            "down": started[1].down_proj.weight.std().item(),
        }


def dtensor(rank):
    """Split x over its tokens and replicate the parameters: no kernel could take these."""
    mesh = init_device_mesh("cpu", (2,))
    adapter = model_of()[1]
    x = torch.randn(BATCH, HIDDEN, generator=torch.Generator().manual_seed(3))
    expected = adapter(x)
    expected.square().sum().backward()
    spread = copy.deepcopy(adapter)
    for projection in (spread.down_proj, spread.up_proj):
        for name, parameter in list(projection.named_parameters()):
            placed = distribute_tensor(parameter.detach(), mesh, [Replicate()])
            projection.register_parameter(name, nn.Parameter(placed))
    call = spread.as_call(distribute_tensor(x, mesh, [Shard(0)]))
    y = spread(call.x)
    y.square().sum().backward()
    wanted = [p.grad for p in adapter.parameters()]
    found = [p.grad.full_tensor() for p in spread.parameters()]
    return {
        "plain": dispatch.select(call).plain,
        "features": sorted(call.features()),
        "placements": str(y.placements),
        "y": largest_difference([y.full_tensor()], [expected]),
        "gradients": largest_difference(found, wanted),
    }


class Banked(nn.Module):
    """A layer and a bank; row i of the whole batch takes the adapter that NAMES has for it.

    "idle" is nobody's, "first" is taken by rows of the first process alone, and in the second batch
    those of the second process take none.
    """

    NAMES = ("first", "both", None, "both", "both", "last", "both", None)

    def __init__(self, units):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.bank = ak.AdapterBank(HIDDEN, BOTTLENECK, slots=5)
        for name, size in zip(("first", "both", "idle", "last"), units, strict=True):
            adapter = ak.BottleneckAdapter(HIDDEN, size, scaling="learned", init="houlsby")
            nn.init.normal_(adapter.up_proj.weight, std=0.3)
            self.bank.add(name, adapter)
        self.rows, self.quiet = range(BATCH), False

    def forward(self, x):
        there = [row for row in self.rows if not (self.quiet and row >= BATCH // 2)]
        names = [self.NAMES[row] if row in there else None for row in self.rows]
        ids = self.bank.ids(names)
        return self.bank(self.layer(x), ak.AdapterRouting(BATCH, 5).update(ids))


def trained_bank(model, rank, wrap):
    """Weights and first gradients, zeros where there are none."""
    banked = model
    if rank is not None:
        model.rows = range(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        model = wrap(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = None
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for step in range(STEPS):
        x, target = data(step)
        if rank is not None:
            half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
            x, target = x[half], target[half]
        banked.quiet = step == 1
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        first = first or [
            torch.zeros(p.shape) if p.grad is None else full(p.grad).clone()
            for p in trained.values()
        ]
        optimizer.step()
    idle = [n for n, p in trained.items() if "idle" in n and p.grad is not None]
    return [full(p).detach().clone() for p in trained.values()], first, idle


def compared_bank(rank, units, wrap):
    weights, gradients, idle = trained_bank(Banked(units), rank, wrap)
    expected_weights, expected_gradients, _ = trained_bank(Banked(units), None, wrap)
    return {
        "weights": largest_difference(weights, expected_weights),
        "gradients": largest_difference(gradients, expected_gradients),
        "size": largest_difference(expected_gradients, [torch.zeros(())] * len(gradients)),
        "idle": idle,
    }


def bank_ddp(rank):
    """Adapters of several ranks; DDP is told that some are in no batch."""
    return compared_bank(
        rank,
        (4, 3, 2, 1),
        lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    )


def bank_fsdp(rank):
    """Adapters of the bank's width; their parameters are no parts of the slots then."""

    def wrap(model):
        fully_shard(model.bank)
        return fully_shard(model)

    return compared_bank(rank, (4, 4, 4, 4), wrap)


def bank_fsdp_narrow(rank):
    """FSDP takes no parameter with gaps, and says so."""
    try:
        fully_shard(Banked((4, 3, 2, 1)).bank)
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return "accepted"


def main(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    checks = (ddp, fsdp, fsdp_bf16, first_fsdp_from_meta, dtensor)
    checks += (bank_ddp, bank_fsdp, bank_fsdp_narrow)
    results = {check.__name__: check(rank) for check in checks}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
