"""Implementations of other libraries, each imported by name where it is installed."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern.bench.built import Built, UnavailableError, parameters_of, share
from adapterkern.bench.cases import BenchCase, Inputs
from adapterkern.bench.many import parts


def _import(module: str, package: str) -> Any:
    """Import a module of another package.

    Raises:
        UnavailableError: it is missing or does not import, with the reason.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = " ".join(str(error).split())[:160]
        raise UnavailableError(f"{package} cannot be imported ({text})") from error


_ADAPTERHUB_ACTIVATIONS = {"gelu_tanh": "gelu_new", "silu": "swish", "leaky_relu": "leakyrelu"}


def adapterhub(case: BenchCase, inputs: Inputs) -> Built:
    """AdapterHub's own `Adapter` module, with its scaling of 1 that it multiplies by."""
    modeling = _import("adapters.methods.modeling", "adapters")
    config = _import("adapters", "adapters").DoubleSeqBnConfig(
        reduction_factor=case.hidden_size / case.bottleneck_size,
        non_linearity=_ADAPTERHUB_ACTIVATIONS.get(case.activation, case.activation),
    )
    module = modeling.Adapter("bench", case.hidden_size, case.bottleneck_size, config)
    module = module.to(inputs.x.device, inputs.x.dtype)
    down, up = module.adapter_down[0], module.adapter_up
    share(down, inputs, "down")
    share(up, inputs, "up")
    return Built(lambda x: module(x, x)[0], parameters_of(down, up), case.activation)


def lora(case: BenchCase, inputs: Inputs) -> Built:
    """PEFT's LoRA layer of rank R on a layer that returns its input: x + B (A x)."""
    layer, _ = _lora_layer(case, "bench")
    down = nn.Linear(case.hidden_size, case.bottleneck_size, bias=False, device="meta")
    up = nn.Linear(case.bottleneck_size, case.hidden_size, bias=False, device="meta")
    share(down, inputs, "down")
    share(up, inputs, "up")
    layer.lora_A["bench"], layer.lora_B["bench"] = down, up
    layer.base_layer = _Identity(case.hidden_size)
    return Built(layer, parameters_of(down, up), "identity", note="no activation, no biases")


def lora_mixed(case: BenchCase, inputs: Inputs) -> Built:
    """PEFT's LoRA layer with an adapter a sequence, which it takes in inference alone."""
    if case.mode != "forward":
        raise UnavailableError("PEFT refuses adapter_names in training")
    layer, config = _lora_layer(case, "0")
    stacks = ("down_weights", "up_weights")
    leaves = parts(inputs, range(case.adapters), stacks)
    for adapter in range(case.adapters):
        name = str(adapter)
        if adapter > 0:
            layer.update_layer(
                name, case.bottleneck_size, lora_alpha=case.bottleneck_size, config=config
            )
        for layers, stack in zip((layer.lora_A, layer.lora_B), stacks, strict=True):
            # The leaf itself, so that the linear layer follows it to other memory.
            layers[name].weight = nn.Parameter(leaves[f"{stack}.{adapter}"].detach())
            leaves[f"{stack}.{adapter}"] = layers[name].weight
    layer.base_layer = _Identity(case.hidden_size, copies=True)
    chosen = ["__base__" if i < 0 else str(i) for i in case.adapter_of_sequences()]

    def forward(x: Tensor) -> Tensor:
        sequences = x.view(case.sequences, case.rows, case.hidden_size)
        return layer(sequences, adapter_names=chosen).view_as(x)

    note = "no activation, no biases; a copy in place of the base's product"
    return Built(forward, leaves, "identity", note=note, in_graph=False)


def _lora_layer(case: BenchCase, name: str) -> tuple[Any, Any]:
    """A LoRA layer of PEFT with one adapter, and its configuration."""
    layers = _import("peft.tuners.lora.layer", "peft")
    peft = _import("peft", "peft")
    rank = {"r": case.bottleneck_size, "lora_alpha": case.bottleneck_size}
    config = peft.LoraConfig(**rank, lora_dropout=0.0)
    # It carries the widths on a device without memory: its own product is not run.
    base = nn.Linear(case.hidden_size, case.hidden_size, bias=False, device="meta")
    return layers.Linear(base, name, config=config, **rank), config


class _Identity(nn.Module):
    """Returns its input, or a copy to be added to, with the widths that PEFT asks a layer for."""

    def __init__(self, hidden_size: int, copies: bool = False) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() if self.copies else x


_CUBLASLT_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


def cublaslt(case: BenchCase, inputs: Inputs) -> Built:
    """Build the best chain of cuBLASLt products: epilogues have activation, biases and residuals.

    Everything is computed transposed, because a bias epilogue runs along the columns.
    """
    advanced = _import("nvmath.linalg.advanced", "nvmath-python")
    if not inputs.x.is_cuda:
        raise UnavailableError("cuBLASLt needs a GPU")
    if case.activation not in _CUBLASLT_ACTIVATIONS:
        has = ", ".join(_CUBLASLT_ACTIVATIONS)
        raise UnavailableError(f"no epilogue for {case.activation} here (has: {has})")
    chain = _CublasLt(advanced, inputs)
    note = "tanh form of GELU" if case.activation == "gelu" else ""
    order = ("down_weight", "up_weight", "down_bias", "up_bias")
    leaves = {name: inputs.parameters[name].detach().requires_grad_() for name in order}

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _CublasLtFunction.apply(x, *leaves.values(), chain)
        return chain.forward(x, leaves, save=False)[0]

    return Built(forward, leaves, _CUBLASLT_ACTIVATIONS[case.activation], note=note)


class _CublasLt:
    """Planned products, one for each place in the chain, whose operands are exchanged by call."""

    def __init__(self, advanced: Any, inputs: Inputs) -> None:
        self._matmul = advanced.Matmul
        self._epilog = advanced.MatmulEpilog
        self._plans: dict[str, Any] = {}

    def forward(
        self, x: Tensor, p: dict[str, Tensor], save: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (y, z for the backward or None, a), each [T, ...]."""
        epilog = "GELU_AUX_BIAS" if save else "GELU_BIAS"
        bias = {"bias": p["down_bias"].detach()}
        out = self._run(f"down {save}", p["down_weight"].detach(), x.detach().T, epilog, bias)
        a, z = (out[0], out[1]["gelu_aux"]) if save else (out, None)  # [R, T]
        bias = {"bias": p["up_bias"].detach()}
        y = self._run("up", p["up_weight"].detach(), a, "BIAS", bias, summand=x.detach().T)
        return y.T, z, a

    def backward(
        self, x: Tensor, dy: Tensor, z: Tensor, a: Tensor, p: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Return (dx, d_down_weight, d_up_weight, d_down_bias, d_up_bias)."""
        dz, extra = self._run(
            "dz", p["up_weight"].detach().T, dy.T, "DGELU_BGRAD", {"gelu_aux": z}
        )  # [R, T]
        d_down_bias = extra["dgelu_bgrad"]
        d_up, extra = self._run("d_up", a, dy, "BGRADB", None)  # [R, H]
        d_up_bias = extra["bgradb"]
        d_down = self._run("d_down", x.T, dz.T, None, None)  # [H, R]
        dx = self._run("dx", p["down_weight"].detach().T, dz, None, None, summand=dy.T)
        return dx.T, d_down.T, d_up.T, d_down_bias.flatten(), d_up_bias.flatten()

    def _run(
        self,
        place: str,
        a: Tensor,
        b: Tensor,
        epilog: str | None,
        epilog_inputs: dict[str, Tensor] | None,
        summand: Tensor | None = None,
    ) -> Any:
        """Compute a @ b (+ summand), through the epilog."""
        scale = {"beta": 1.0} if summand is not None else {}
        plan = self._plans.get(place)
        if plan is None:
            plan = self._plans[place] = self._matmul(a, b, summand, **scale)
            chosen = None if epilog is None else getattr(self._epilog, epilog)
            plan.plan(epilog=chosen, epilog_inputs=epilog_inputs)
        else:
            # A place sees one shape and layout, so nvmath's checks would only cost host time.
            reset = getattr(plan, "reset_operands_unchecked", plan.reset_operands)
            reset(a=a, b=b, c=summand, epilog_inputs=epilog_inputs, **scale)
        return plan.execute()


class _CublasLtFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down_weight, up_weight, down_bias, up_bias, chain):
        names = ("down_weight", "up_weight", "down_bias", "up_bias")
        ctx.parameters = dict(zip(names, (down_weight, up_weight, down_bias, up_bias), strict=True))
        ctx.chain = chain
        y, z, a = chain.forward(x, ctx.parameters, save=True)
        ctx.save_for_backward(x, z, a)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, a = ctx.saved_tensors
        return (*ctx.chain.backward(x, dy, z, a, ctx.parameters), None)
