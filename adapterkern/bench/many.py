"""Ways to serve the many adapters of one batch: this package's op, and what stands in for it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern.bench.built import Built, UnavailableError
from adapterkern.bench.cases import BenchCase, Inputs, parameter
from adapterkern.functional import bottleneck_adapter
from adapterkern.grouped.functional import grouped_bottleneck_adapter
from adapterkern.grouped.routing import AdapterRouting

# A parameter of one adapter by the stack that holds those of all.
ONE_OF = {
    "down_weights": "down_weight",
    "up_weights": "up_weight",
    "down_biases": "down_bias",
    "up_biases": "up_bias",
}


def routing_of(case: BenchCase, device: torch.device) -> AdapterRouting:
    """Return the routing of the case's batch."""
    return AdapterRouting(case.tokens, case.adapters, device=device).update(case.ids(device))


def grouped(case: BenchCase, inputs: Inputs, backend: str) -> Built:
    """Build this package's op on one of its backends, with the batch routed before."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.parameters.items()}
    routing = routing_of(case, inputs.x.device)
    stacks: dict[str, Any] = leaves

    def forward(x: Tensor) -> Tensor:
        return grouped_bottleneck_adapter(
            x, routing=routing, activation=case.activation, backend=backend, **stacks
        )

    return Built(forward, leaves, case.activation)


def parts(inputs: Inputs, adapters: Iterable[int], stacks: Iterable[str] = ONE_OF) -> Any:
    """Return a leaf for each part of a stack that one of these adapters has, by name."""
    names = [f"{stack}.{adapter}" for adapter in adapters for stack in stacks]
    found = {name: parameter(inputs.parameters, name) for name in names}
    return {name: t.detach().requires_grad_() for name, t in found.items() if t is not None}


def adapter_of(leaves: dict[str, Tensor], adapter: int, activation: str) -> Callable[..., Tensor]:
    """Return one adapter of those leaves as a function of its tokens."""
    of_one: dict[str, Any] = {one: leaves[f"{stack}.{adapter}"] for stack, one in ONE_OF.items()}
    return lambda x: bottleneck_adapter(x, **of_one, activation=activation)


def single(case: BenchCase, inputs: Inputs) -> Built:
    """Build one fused adapter that all tokens take: as many bytes of x and y, fewer weights."""
    leaves = parts(inputs, [0])
    forward = adapter_of(leaves, 0, case.activation)
    return Built(forward, leaves, case.activation, note="one adapter for all tokens")


def loop(case: BenchCase, inputs: Inputs) -> Built:
    """Build a loop over the adapters, each of which is one fused call on its tokens.

    x is put in the order of the adapters at once, and y back. PEFT and AdapterHub gather for each
    adapter anew, so this is the fastest of the loops.
    """
    if not case.used_adapters:
        raise UnavailableError("no token takes an adapter, so there is nothing to loop over")
    leaves = parts(inputs, range(case.adapters))
    ids = case.ids(inputs.x.device).long()
    order = torch.argsort(ids, stable=True)
    back = torch.argsort(order)
    counts = torch.bincount(ids, minlength=case.adapters).tolist()
    adapters = [adapter_of(leaves, i, case.activation) for i in range(case.adapters)]

    def forward(x: Tensor) -> Tensor:
        groups = x.index_select(0, order).split(counts)
        results = [adapter(of_it) for adapter, of_it in zip(adapters, groups, strict=True)]
        return torch.cat(results).index_select(0, back)

    return Built(forward, leaves, case.activation)


def routing(case: BenchCase, inputs: Inputs) -> Built:
    """Build the sort of the batch's tokens by adapter, which serves all layers of a model."""
    ids, buffers = case.ids(inputs.x.device), routing_of(case, inputs.x.device)

    def prepare(_x: Tensor, _dy: Tensor) -> Callable[[], Any]:
        return lambda: buffers.update(ids)

    note = "routing.update alone, once a batch"
    return Built(nn.Identity(), checked=False, note=note, alone=prepare)
