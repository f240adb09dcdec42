"""The providers to time: this package's backends, plain layers, what torch offers, the limits.

A provider builds one implementation from the case's own tensors. Other libraries' implementations
are in `bench.external`, which imports a library when it is asked for.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import NAMES, get
from adapterkern.bench import external, many
from adapterkern.bench.built import Built, UnavailableError, parameters_of, share
from adapterkern.bench.cases import EPS, BenchCase, Inputs
from adapterkern.functional import bottleneck_adapter, bottleneck_adapter_norm


@dataclass(frozen=True)
class Provider:
    """A name on the command line and how it is built; ours: one of this package's backends; kinds:
    of the cases that it computes (`BenchCase.kind`)."""

    name: str
    summary: str
    build: Callable[[BenchCase, Inputs], Built]
    ours: bool = False
    compiled: bool = False  # takes seconds to minutes to build
    kinds: tuple[str, ...] = ("one", "norm")


class _Layers(nn.Module):
    """act(x W_down^T + b_down) W_up^T + b_up + x through nn.Sequential, as one writes it first."""

    def __init__(self, case: BenchCase, inputs: Inputs) -> None:
        super().__init__()
        self.down = nn.Linear(case.hidden_size, case.bottleneck_size, device="meta")
        self.up = nn.Linear(case.bottleneck_size, case.hidden_size, device="meta")
        share(self.down, inputs, "down")
        share(self.up, inputs, "up")
        self.layers = nn.Sequential(self.down, _Activation(case.activation), self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.value = ACTIVATIONS[name].value

    def forward(self, z: Tensor) -> Tensor:
        return self.value(z)


def _backend(name: str) -> Callable[[BenchCase, Inputs], Built]:
    def build(case: BenchCase, inputs: Inputs) -> Built:
        reason = get(name).unavailable_reason()
        if reason is not None:
            raise UnavailableError(reason)
        if case.kind == "many":
            return many.grouped(case, inputs, name)
        leaves = _leaves(inputs)
        weights = leaves["down_weight"], leaves["up_weight"]
        biases = leaves["down_bias"], leaves["up_bias"]
        activation, norm = case.activation, case.norm
        everything: dict[str, Any] = leaves

        def forward(x: Tensor) -> Tensor:
            return bottleneck_adapter(x, *weights, *biases, activation=activation, backend=name)

        def forward_of_norm(x: Tensor) -> Tensor:
            return bottleneck_adapter_norm(
                x, **everything, activation=activation, norm=norm, eps=EPS, backend=name
            )

        return Built(forward if norm == "none" else forward_of_norm, leaves, activation)

    return build


def _separate(case: BenchCase, inputs: Inputs) -> Built:
    """Build this package's operation with the skip in it, and torch's norm behind it."""
    leaves = _leaves(inputs)
    of_norm = {name: leaves[name] for name in leaves if name.startswith("norm_")}
    adapter: dict[str, Any] = {name: leaves[name] for name in leaves if name not in of_norm}
    activation = case.activation

    def forward(x: Tensor) -> Tensor:
        y = bottleneck_adapter(x, **adapter, activation=activation)
        return _torch_norm(case, y, **of_norm)

    return Built(forward, leaves, activation)


def _torch_norm(
    case: BenchCase, y: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None
) -> Tensor:
    shape = y.shape[-1:]
    if case.norm == "layer":
        return F.layer_norm(y, shape, norm_weight, norm_bias, EPS)
    return F.rms_norm(y, shape, norm_weight, EPS)


def _before_norm(
    build: Callable[[BenchCase, Inputs], Built],
) -> Callable[[BenchCase, Inputs], Built]:
    """Build an adapter, and in a case with a norm torch's add of the skip and its norm too."""

    def build_both(case: BenchCase, inputs: Inputs) -> Built:
        built = build(case, inputs)
        if case.norm == "none":
            return built
        names = ("skip", "norm_weight", "norm_bias")
        leaves = {name: t for name, t in _leaves(inputs).items() if name in names}
        of_norm = {name: t for name, t in leaves.items() if name != "skip"}

        def forward(x: Tensor) -> Tensor:
            return _torch_norm(case, built.forward(x) + leaves["skip"], **of_norm)

        return replace(built, forward=forward, parameters=built.parameters | leaves)

    return build_both


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in inputs.parameters.items()}


def _plain(case: BenchCase, inputs: Inputs) -> Built:
    module = _Layers(case, inputs)
    return Built(module, parameters_of(module.down, module.up), case.activation)


class _Addmm(torch.autograd.Function):
    """The least that torch's own operators need: biases ride on the products, adds are in place."""

    @staticmethod
    def forward(ctx, x, down_weight, up_weight, down_bias, up_bias, activation):
        z = torch.addmm(down_bias, x, down_weight.T)
        a = ACTIVATIONS[activation].value(z)
        ctx.save_for_backward(x, down_weight, up_weight, z)
        ctx.activation = activation
        return torch.addmm(up_bias, a, up_weight.T).add_(x)

    @staticmethod
    def backward(ctx, dy):
        x, down_weight, up_weight, z = ctx.saved_tensors
        with torch.enable_grad():
            z_leaf = z.detach().requires_grad_()
            a = ACTIVATIONS[ctx.activation].value(z_leaf)
        (dz,) = torch.autograd.grad(a, z_leaf, dy @ up_weight)
        dx = torch.addmm(dy, dz, down_weight)
        return dx, dz.T @ x, dy.T @ a.detach(), dz.sum(0), dy.sum(0), None


def _addmm(case: BenchCase, inputs: Inputs) -> Built:
    leaves = _leaves(inputs)
    order = ("down_weight", "up_weight", "down_bias", "up_bias")
    parameters = [leaves[name] for name in order]
    down_weight, up_weight, down_bias, up_bias = parameters
    # The matrix library's fused GELU is the tanh form, which the erf form's row must not claim.
    fused = inputs.x.is_cuda and case.activation in ("relu", "gelu", "gelu_tanh")
    activation, note = case.activation, ""
    if fused and case.mode == "forward" and activation == "gelu":
        activation, note = "gelu_tanh", "tanh form of GELU"

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _Addmm.apply(x, *parameters, activation)
        if fused:
            gelu = activation != "relu"
            a = torch._addmm_activation(down_bias, x, down_weight.T, use_gelu=gelu)
        else:
            a = ACTIVATIONS[activation].value(torch.addmm(down_bias, x, down_weight.T))
        return torch.addmm(up_bias, a, up_weight.T).add_(x)

    return Built(forward, leaves, activation, note=note)


def _compile(mode: str) -> Callable[[BenchCase, Inputs], Built]:
    def build(case: BenchCase, inputs: Inputs) -> Built:
        import torch._functorch.config as functorch_config

        # Donated buffers forbid a second backward of one forward, which timing a backward needs.
        functorch_config.donated_buffer = False
        _silence_autotuning()
        built = _before_norm(_plain)(case, inputs)
        compiled = torch.compile(built.forward, mode=mode, dynamic=False)
        start = time.perf_counter()
        if case.mode == "forward":
            with torch.no_grad():
                compiled(inputs.x)
        else:
            x = inputs.x.detach().requires_grad_()
            torch.autograd.grad(compiled(x), [x, *built.parameters.values()], inputs.dy)
        seconds = time.perf_counter() - start
        return replace(built, forward=compiled, note=f"compiled in {seconds:.1f} s")

    return build


def _silence_autotuning() -> None:
    """Keep Inductor's tables of tried kernels out of a benchmark's output."""
    module = "torch._inductor.select_algorithm"
    if importlib.util.find_spec(module) is not None:
        importlib.import_module(module).PRINT_AUTOTUNE = False  # type: ignore[attr-defined]


def _no_adapter(case: BenchCase, inputs: Inputs) -> Built:
    without = "returns its input: no kernel runs"
    note = without if case.norm == "none" else "the add and the norm of a block without an adapter"
    return Built(nn.Identity(), checked=False, note=note)


def _limit(case: BenchCase, inputs: Inputs) -> Built:
    """Build the passes over memory that none can do without: y = x, and dx = dy + x."""
    if case.norm != "none":
        return _limit_of_norm(case, inputs)

    def prepare(x: Tensor, dy: Tensor) -> Callable[[], Any]:
        x, y, dx = x.detach(), torch.empty_like(x), torch.empty_like(x)

        def both() -> tuple[Tensor, Tensor]:
            return y.copy_(x), torch.add(dy, x, out=dx)

        calls = {"forward": lambda: y.copy_(x), "backward": lambda: torch.add(dy, x, out=dx)}
        return calls.get(case.mode, both)

    passes = {"forward": "y = x", "backward": "dx = dy + x", "step": "y = x, then dx = dy + x"}
    return Built(nn.Identity(), checked=False, note=passes[case.mode], alone=prepare)


def _limit_of_norm(case: BenchCase, inputs: Inputs) -> Built:
    """Build as many passes: x and skip are read, y is written, and for a backward the stream; that
    reads dy, the stream and x, and writes dx and the gradient of skip.
    """
    leaf = inputs.parameters["skip"].detach().requires_grad_()

    def prepare(x: Tensor, dy: Tensor) -> Callable[[], Any]:
        x, first, second = x.detach(), torch.empty_like(x), torch.empty_like(x)

        def forward() -> tuple[Tensor, ...]:
            return (torch.add(x, leaf.detach(), out=first),)

        def backward() -> tuple[Tensor, ...]:
            return torch.add(dy, x, out=first), second.copy_(leaf.detach())

        def both() -> tuple[Tensor, ...]:
            return first.copy_(x), second.copy_(leaf.detach()), *backward()

        return {"forward": forward, "backward": backward}.get(case.mode, both)

    passes = {"forward": "y = x + skip", "backward": "dx = dy + x, then a copy"}
    note = passes.get(case.mode, "two copies, then dx = dy + x and a copy")
    return Built(nn.Identity(), {"skip": leaf}, checked=False, note=note, alone=prepare)


KINDS = ("one", "norm", "many")
BACKENDS = tuple(
    Provider(name, f"this package on its {name} backend", _backend(name), ours=True, kinds=KINDS)
    for name in NAMES
)
BASELINES = (
    Provider("plain", "nn.Sequential of two nn.Linear, plus x", _before_norm(_plain)),
    Provider("adapterhub", "Adapter of the adapters package", _before_norm(external.adapterhub)),
    Provider("addmm", "torch.addmm and an add in place", _before_norm(_addmm)),
    Provider("compile", "torch.compile of plain", _compile("default"), compiled=True),
    Provider(
        "compile-max",
        "torch.compile of plain, max-autotune without graphs",
        _compile("max-autotune-no-cudagraphs"),
        compiled=True,
    ),
    Provider(
        *("cublaslt", "cuBLASLt products with fused epilogues (nvmath)"),
        _before_norm(external.cublaslt),
    ),
    Provider(
        *("lora", "PEFT's LoRA of equal rank without its base product"),
        _before_norm(external.lora),
    ),
    Provider(
        "separate", "this package's operation, torch's norm behind it", _separate, kinds=("norm",)
    ),
    Provider("single", "one fused adapter for all tokens", many.single, kinds=("many",)),
    Provider("loop", "a fused call for each adapter's tokens", many.loop, kinds=("many",)),
    Provider(
        "lora-mixed",
        "PEFT's LoRA of equal rank, adapter_names",
        external.lora_mixed,
        kinds=("many",),
    ),
    Provider(
        "routing", "the sort of a batch's tokens, once a batch", many.routing, kinds=("many",)
    ),
    Provider("no-adapter", "y is x; with a norm, that of x + skip", _before_norm(_no_adapter)),
    Provider("limit", "copy x to y; for the backward dx = dy + x", _limit, kinds=KINDS),
)
PROVIDERS = {provider.name: provider for provider in (*BACKENDS, *BASELINES)}


def providers(names: list[str]) -> list[Provider]:
    """Return the providers of these names, each once.

    Raises:
        ValueError: an unknown name; the message lists the names that are known.
    """
    for name in names:
        if name not in PROVIDERS:
            baselines = ", ".join(provider.name for provider in BASELINES)
            raise ValueError(
                f"unknown baseline or backend {name!r}.\n  hint: known baselines are {baselines}; "
                f"known backends are {', '.join(NAMES)}."
            )
    return [PROVIDERS[name] for name in dict.fromkeys(names)]
