"""Train adapters in a frozen transformer on several devices, with DDP or FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --fsdp

On a machine with GPUs each process takes one and NCCL connects them; elsewhere they run on the CPU
under gloo. The task is small enough to be learned in seconds: which of two tokens is more frequent.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import adapterkern as ak

VOCABULARY, LENGTH, HIDDEN, HEADS, LAYERS = 8, 16, 64, 4, 2


class Block(nn.Module):
    """A pre-LN transformer block with an adapter after its feed-forward network."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN)
        )
        self.adapter = ak.BottleneckAdapter(HIDDEN, 16)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        # skip=x: the block's own residual add happens in the adapter's pass over memory.
        return self.adapter(self.ffn(self.norm2(x)), skip=x)


class Classifier(nn.Module):
    """Token and position embeddings, blocks, and a head over the mean of all tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def draw(size, generator, device):
    """Random sequences and their labels: 1 where token 1 is more frequent than token 2."""
    ids = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    labels = (ids == 1).sum(1) > (ids == 2).sum(1)
    return ids.to(device), labels.long().to(device)


def freeze_base(model):
    """Leave only the adapters and the head to train; return their share of the parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name or name.startswith("head"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in model.parameters())


def distribute(model, device, fsdp):
    """The model over all processes: sharded block by block, or replicated."""
    if not fsdp:
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def main():
    """Train, then report the held-out accuracy from the first process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="shard with FSDP2 instead of DDP")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same model in every process
    model = Classifier().to(device)
    share = freeze_base(model)
    model = distribute(model, device, options.fsdp)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    if rank == 0:
        method = "FSDP2" if options.fsdp else "DDP"
        print(f"{method} over {processes} processes ({dist.get_backend()}), training {share:.1%}")

    generator = torch.Generator().manual_seed(1 + rank)  # different data in every process
    for step in range(options.steps):
        ids, labels = draw(64, generator, device)
        loss = cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")

    ids, labels = draw(1024, generator, device)
    with torch.no_grad():
        accuracy = (model(ids).argmax(1) == labels).float().mean()
    dist.all_reduce(accuracy)
    if rank == 0:
        print(f"held-out accuracy {accuracy.item() / processes:.3f}")
    dist.barrier()  # wait until no gloo thread holds a tensor, or the exit may deadlock
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
