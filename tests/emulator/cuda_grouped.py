"""Calls of many adapters, and how far the CUDA kernels are off in one."""

import contextlib
import ctypes
import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_emulator
import torch
from torch import Tensor

from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device
from adapterkern.grouped import reference
from adapterkern.grouped.call import ROUTING, GroupedCall, make_grouped_call
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.parity import TruncatedProducts, judge

# On the first every call of two tokens or more is one of tiles, on the second every one of rows,
# over three slices of H at the most.
TILES, ROWS = Device(1), Device(150)
BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


class GroupedEmulator(cuda_emulator.Emulator):
    """Stands in for the extension, for calls of many adapters alone."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        function = self.library.emulated_grouped_forward
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint]
        self.seed = cuda_emulator.ROUND_ROBIN

    def grouped_forward(self, packed: bytes, device: int, stream: int) -> None:
        cuda_emulator._check(self.library.emulated_grouped_forward(packed, len(packed), self.seed))


def build(folder: Path, **options) -> GroupedEmulator:
    return GroupedEmulator(cuda_emulator.build(folder, "grouped.cpp", **options))


def backend(kernels: GroupedEmulator, device: Device) -> CudaBackend:
    return CudaBackend(kernels, device)


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@dataclass(frozen=True)
class GroupedCase:
    """A batch whose tokens take different adapters; units and slots that none has are NaN."""

    dtype: torch.dtype = BF16
    tokens: int = 37
    hidden: int = 136
    bottleneck: int = 24
    ranks: Sequence[int] | None = (24, 0, 7, 16)  # R of each of so many slots, or None: four of R
    biases: str = "both"  # | "down" | "up" | "none"
    residual: str = "input"  # | "tensor" | "none"
    skip: bool = True
    scalings: bool = True
    activation: str = "gelu"
    weights: torch.dtype | None = None  # of all but x, residual and skip
    stream: torch.dtype | None = None  # of residual and skip
    gaps: bool = False  # between the rows of x, and of the weights
    room: int = 0  # tokens for which the routing is made beyond those there are
    ids: Sequence[int] | None = None

    def draw(self, seed: int = 0) -> GroupedCall:
        generator = torch.Generator().manual_seed(seed)
        weights, stream = self.weights or self.dtype, self.stream or self.dtype
        hidden, bottleneck = self.hidden, self.bottleneck
        ranks = [bottleneck] * 4 if self.ranks is None else list(self.ranks)
        slots = len(ranks)

        def normal(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
            return (spread * torch.randn(*shape, generator=generator)).to(dtype)

        def spaced(tensor: Tensor) -> Tensor:
            """The same rows an odd number of elements apart."""
            if not self.gaps:
                return tensor
            room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
            room[..., 1:-2] = tensor
            return room[..., 1:-2]

        x = spaced(normal(self.tokens, hidden, dtype=self.dtype))
        down = normal(slots, bottleneck, hidden, dtype=weights, spread=hidden**-0.5)
        up = normal(slots, hidden, bottleneck, dtype=weights, spread=bottleneck**-0.5)
        down_biases = normal(slots, bottleneck, dtype=weights, spread=0.3)
        up_biases = normal(slots, hidden, dtype=weights, spread=0.3)
        scalings = normal(slots, dtype=torch.float32)
        for slot, rank in enumerate(ranks):
            down[slot, rank:] = up[slot, :, rank:] = down_biases[slot, rank:] = float("nan")
            if rank == 0:
                up_biases[slot] = scalings[slot] = float("nan")
        ids = self.ids
        if ids is None:
            ids = torch.randint(-1, slots, (self.tokens,), generator=generator)
        routing = AdapterRouting(self.tokens + self.room, slots).update(ids)
        residual = normal(self.tokens, hidden, dtype=stream) if self.residual == "tensor" else None
        call = make_grouped_call(
            x,
            spaced(down),
            spaced(up),
            down_biases if self.biases in ("both", "down") else None,
            up_biases if self.biases in ("both", "up") else None,
            "input" if self.residual == "input" else residual,
            spaced(normal(self.tokens, hidden, dtype=stream)) if self.skip else None,
            scalings if self.scalings else None,
            None if self.ranks is None else torch.tensor(ranks, dtype=torch.int32),
            routing.buffers(),
            self.activation,
            False,
        )
        return call


def permuted(call: GroupedCall, order: Tensor) -> GroupedCall:
    """The same call with its rows in another order."""
    routing = AdapterRouting(len(order), call.slots).update(call.token_slots[order])
    buffers = dict(zip(ROUTING, routing.buffers(), strict=True))
    moved = {n: None if (t := getattr(call, n)) is None else t[order] for n in ("residual", "skip")}
    return call._replace(x=call.x[order], **moved, **buffers)


def missed(call: GroupedCall, cuda: CudaBackend, tf32: bool = False) -> list[str]:
    """What the cuda backend computes beyond the tolerance of the parity rule."""
    with tf32_products() if tf32 else contextlib.nullcontext():
        y, z = cuda.grouped_forward(call, True)
        alone, none = cuda.grouped_forward(call, False)
    assert none is None
    assert y.is_contiguous()
    eager_y, eager_z = reference.forward(call)
    rounded = ("x", "down_weights", "up_weights", "down_biases", "up_biases")
    wide = {}
    for name, tensor in call.tensors().items():
        if tensor is not None and tensor.is_floating_point():
            operand = tensor.to(call.compute_dtype) if name in rounded else tensor
            wide[name] = operand.double()
    added = call.x.double() if call.add_input else wide.get("residual")
    oracle_call = call._replace(
        **{**wide, "residual": added}, add_input=False, compute_dtype=torch.float64
    )
    oracle_y, oracle_z = reference.forward(oracle_call)
    yardsticks = [(eager_y, eager_z)]
    if tf32:
        with TruncatedProducts():
            yardsticks.append(reference.forward(oracle_call))
    rows = []
    if (y.dtype, y.shape, z.dtype, z.shape) != (
        eager_y.dtype, eager_y.shape, eager_z.dtype, eager_z.shape,
    ):  # fmt: skip
        rows.append(f"y {y.dtype} {y.shape}, z {z.dtype} {z.shape}")
    if not torch.equal(y, alone):
        rows.append("y depends on whether z is kept")
    taken = absent_units(call)
    if z[taken].count_nonzero() > 0:
        rows.append("z is not zero where there are no units")
    for name, out, oracle, index in (("y", y, oracle_y, 0), ("y: z", z, oracle_z, 1)):
        others = [pair[index] for pair in yardsticks]
        error, tolerance = judge(name, out, oracle, others, others[0].dtype)
        if not error <= tolerance:
            rows.append(f"{name}: {error:.2e} beyond {tolerance:.2e}")
    return rows


def absent_units(call: GroupedCall) -> Tensor:
    """[T, R], True where a token has no such unit."""
    slots = call.token_slots[: call.num_tokens].long()
    ranks = torch.full((call.slots,), call.bottleneck_size)
    if call.ranks is not None:
        ranks = call.ranks.long()
    of_token = torch.where(slots < 0, 0, ranks[slots.clamp(min=0)])
    return torch.arange(call.bottleneck_size) >= of_token[:, None]


def random_case(number: int) -> tuple[GroupedCase, Device, int]:
    """One of very many small batches, on a device, under a seed of the emulator."""
    draw = random.Random(number)
    bottleneck = draw.choice((1, 5, 8, 17, 24, 32))
    slots = draw.randint(1, 5)
    ranks = [draw.randint(0, bottleneck) for _ in range(slots)] if draw.random() < 0.8 else None
    case = GroupedCase(
        dtype=draw.choice((BF16, HALF, FLOAT)),
        tokens=draw.randint(2, 70),
        hidden=draw.choice((8, 13, 40, 64, 72)),
        bottleneck=bottleneck,
        ranks=ranks,
        biases=draw.choice(("both", "down", "up", "none")),
        residual=draw.choice(("input", "tensor", "none")),
        skip=draw.random() < 0.5,
        scalings=draw.random() < 0.5,
        activation=draw.choice(("gelu", "sigmoid", "relu", "tanh")),
        gaps=draw.random() < 0.3,
        room=draw.choice((0, 0, 90)),
    )
    device = draw.choice((TILES, ROWS))
    if draw.random() < 0.2:  # master weights beside half precision, or rows of float32
        case = dataclasses.replace(case, weights=FLOAT, stream=draw.choice((None, FLOAT)))
    return case, device, draw.randint(0, 3)
