"""Calls with a norm, and how far the CUDA kernels are off in one."""

from dataclasses import dataclass

import torch
from cuda_forms import CLUSTER_MEMORY
from torch import Tensor

from adapterkern import reference
from adapterkern.backends import get
from adapterkern.backends.cuda.facts import Device
from adapterkern.backends.cuda.launch_config import Slices, TokenPlan
from adapterkern.parity import judge
from adapterkern.results import Needs, Outputs
from adapterkern.spec import AdapterCall, make_call, tensor_values, with_norm

CLUSTERS = Device(1, CLUSTER_MEMORY)
UPSTREAM = ("y", "normed")


def plan(size: int, tokens: int, hidden: int, number: int = 1) -> TokenPlan:
    """`number` clusters of `size` blocks that work on so many tokens at a time."""
    panels = -(-hidden // (64 * size))
    return TokenPlan(Slices(size, 64 * panels), number, tokens)


def gapped(tensor: Tensor) -> Tensor:
    """The same rows an odd number of elements apart."""
    room = tensor.new_zeros(tensor.shape[0], tensor.shape[1] + 3)
    room[:, 1:-2] = tensor
    return room[:, 1:-2]


@dataclass(frozen=True)
class NormCase:
    """A call with a norm and the gradients of its outputs."""

    dtype: torch.dtype = torch.bfloat16
    tokens: int = 37
    hidden: int = 264
    bottleneck: int = 20
    norm: str = "layer"
    parameters: torch.dtype | None = None  # of the norm; None: that of the products
    weight: bool = True
    bias: bool = True
    offset: float = 0.0
    cast: bool = False
    residual: str = "input"  # | "tensor" | "none"
    skip: bool = True
    scaling: str = "float"  # | "channel"
    mean: float = 0.0  # of the sum, more or less
    gaps: bool = False  # between rows
    wide_input: bool = False  # x in float32 beside products in half precision
    d_stream: bool = True
    prenorm: bool = True

    def draw(self, seed: int = 0) -> tuple[AdapterCall, Outputs]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype, spread: float = 1.0) -> Tensor:
            return (spread * torch.randn(*shape, generator=generator)).to(dtype)

        hidden, bottleneck, parameters = self.hidden, self.bottleneck, self.parameters or self.dtype
        rows = self.tokens, hidden
        x_dtype = torch.float32 if self.wide_input else self.dtype
        x = (normal(*rows, dtype=torch.float32) + self.mean).to(x_dtype)
        added = gapped if self.gaps else lambda tensor: tensor
        residual = added(normal(*rows)) if self.residual == "tensor" else self.residual
        residual = None if self.residual == "none" else residual
        call = make_call(
            added(x),
            normal(bottleneck, hidden, spread=hidden**-0.5),
            normal(hidden, bottleneck, spread=bottleneck**-0.5),
            normal(bottleneck, spread=0.1),
            normal(hidden, spread=0.1),
            residual,
            added(normal(*rows)) if self.skip else None,
            scaling=normal(hidden) if self.scaling == "channel" else 0.7,
        )._replace(compute_dtype=self.dtype)
        weight = 1 - self.offset + normal(hidden, dtype=torch.float32, spread=0.3)
        call = with_norm(
            call,
            weight.to(parameters) if self.weight else None,
            normal(hidden, dtype=parameters) if self.bias else None,
            self.norm,
            1e-5,
            self.offset,
            self.cast,
            self.prenorm,
        )
        d_normed = added(normal(*rows, dtype=call.normed_dtype))
        return call, Outputs(added(normal(*rows)) if self.d_stream else None, d_normed)


def all_needs(call: AdapterCall) -> Needs:
    return Needs(*(tensor is not None for tensor in tensor_values(call)))


def results_of(backend, call: AdapterCall, upstream: Outputs, save=True) -> dict[str, Tensor]:
    """Every output, saved tensor and gradient, by name."""
    if backend is reference:
        outputs, saved = reference.forward_of_values(call)
    else:
        outputs, saved = backend.forward(call, save)
    found = outputs._asdict() | saved._asdict()
    if save:
        needs = all_needs(call)
        saved = saved._replace(stream=outputs.y)
        gradients = backend.backward(call.for_backward(needs), saved, upstream, needs)
        found |= {f"d_{name}": gradient for name, gradient in gradients._asdict().items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def missed(case: NormCase) -> list[str]:
    """What the cuda backend computes beyond the tolerance of the parity rule."""
    call, upstream = case.draw()
    found = results_of(get("cuda"), call, upstream)
    eager = results_of(reference, call, upstream)
    wide = {name: t.double() for name, t in call.tensors().items() if t is not None}
    wide = {n: t.to(case.dtype).double() if n == "x" else t for n, t in wide.items()}
    oracle_call = call._replace(**wide, compute_dtype=torch.float64)
    d_wide = Outputs(*(None if d is None else d.double() for d in upstream))
    oracle = results_of(reference, oracle_call, d_wide)
    assert found.keys() == eager.keys() == oracle.keys()
    rows = []
    for name, out in found.items():
        if (out.dtype, out.shape) != (eager[name].dtype, eager[name].shape):
            rows.append(f"{name}: {out.dtype} {out.shape}")
        rule = name if name.startswith("d_") else f"y: {name}"
        error, tolerance = judge(rule, out, oracle[name], [eager[name]], out.dtype)
        if not error <= tolerance:
            rows.append(f"{name}: {error:.2e} beyond {tolerance:.2e}")
    return rows
