"""The cuBLASLt chain on a stand-in for nvmath that computes each epilogue in plain torch."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from adapterkern.bench import external
from adapterkern.bench.cases import BenchCase

NAMES = ("GELU_BIAS", "GELU_AUX_BIAS", "BIAS", "DGELU_BGRAD", "BGRADB")


class Matmul:
    """D = epilog(a @ b + beta c); the bias runs along the columns, as in cuBLASLt."""

    def __init__(self, a, b, c=None, beta=None):
        self.operands = a, b, c

    def plan(self, epilog=None, epilog_inputs=None):
        self.epilog, self.inputs = epilog, epilog_inputs or {}

    def reset_operands(self, *, a, b, c=None, epilog_inputs=None, beta=None):
        self.operands, self.inputs = (a, b, c), epilog_inputs or {}

    def execute(self):
        a, b, c = self.operands
        out = a @ b if c is None else a @ b + c
        if self.epilog in ("GELU_BIAS", "GELU_AUX_BIAS", "BIAS"):
            out = out + self.inputs["bias"][:, None]
        if self.epilog == "GELU_AUX_BIAS":
            return F.gelu(out, approximate="tanh"), {"gelu_aux": out}
        if self.epilog == "GELU_BIAS":
            return F.gelu(out, approximate="tanh")
        if self.epilog == "BGRADB":
            return out, {"bgradb": b.sum(0)}
        if self.epilog == "DGELU_BGRAD":
            z = self.inputs["gelu_aux"].detach().requires_grad_()
            with torch.enable_grad():
                (out,) = torch.autograd.grad(F.gelu(z, approximate="tanh"), z, out)
            return out, {"dgelu_bgrad": out.sum(1, keepdim=True)}
        return out


class Unchecked(Matmul):
    """A later nvmath, whose unchecked way takes operands without a look at them."""

    def reset_operands_unchecked(self, **operands):
        Matmul.reset_operands(self, **operands)

    def reset_operands(self, **operands):
        raise AssertionError("the slow way")


@pytest.fixture(params=[Matmul, Unchecked], ids=["checked", "unchecked"])
def chain(request):
    advanced = SimpleNamespace(
        Matmul=request.param, MatmulEpilog=SimpleNamespace(**{name: name for name in NAMES})
    )
    inputs = BenchCase(24, 6, 11, "fp32", "gelu_tanh", "step").draw("cpu")
    inputs = type(inputs)(
        inputs.x.double(),
        inputs.dy.double(),
        {name: tensor.double() for name, tensor in inputs.parameters.items()},
    )
    return external._CublasLt(advanced, inputs), inputs


def test_the_chain_gives_y_and_every_gradient(chain):
    chain, inputs = chain
    leaves = {n: inputs.parameters[n].requires_grad_() for n in
              ("down_weight", "up_weight", "down_bias", "up_bias")}  # fmt: skip
    x = inputs.x.requires_grad_()
    for _ in range(2):  # the second time with exchanged operands
        y = external._CublasLtFunction.apply(x, *leaves.values(), chain)
        z = F.linear(x, leaves["down_weight"], leaves["down_bias"])
        a = F.gelu(z, approximate="tanh")
        wanted = x + F.linear(a, leaves["up_weight"], leaves["up_bias"])
        torch.testing.assert_close(y, wanted)
        found = torch.autograd.grad(y, [x, *leaves.values()], inputs.dy)
        expected = torch.autograd.grad(wanted, [x, *leaves.values()], inputs.dy)
        for gradient, oracle in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, oracle)


def test_the_forward_alone_saves_nothing(chain):
    chain, inputs = chain
    y, z, _ = chain.forward(inputs.x, inputs.parameters, save=False)
    assert z is None
    assert y.shape == inputs.x.shape
