"""adapterkern.parity: what is tolerated of float32 products in TF32."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapterkern import parity
from adapterkern.backends.base import allow_tf32
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.parity import Case, check_case
from adapterkern.parity.tf32 import truncated
from adapterkern.results import Outputs


def missed(case) -> set[str]:
    return {row.tensor for row in check_case(case, "reference") if not row.passed}


def test_tf32_operands_lose_the_bits_that_tf32_has_not():
    values = [1 + 2**-10, 1 + 2**-11, -1 - 2**-10 - 2**-11, 3.5, math.inf, -math.inf]
    kept = [1 + 2**-10, 1.0, -1 - 2**-10, 3.5, math.inf, -math.inf]
    tensor = torch.tensor([*values, math.nan], dtype=torch.float64)
    cut = truncated(tensor)
    assert cut[:-1].tolist() == kept
    assert cut[-1].isnan()


@pytest.mark.parametrize("shape", [(37,), (5, 7)])
@pytest.mark.parametrize("bias", ["both", "none"])
def test_tf32_reaches_every_product_and_nothing_else(shape, bias):
    """y and all gradients equal numpy's products of operands that are cut off."""
    case = Case(shape=shape, activation="identity", bias=bias, residual="none", tf32=True)
    wide = {name: tensor.double() for name, tensor in case.draw("cpu", seed=0).items()}
    dy = torch.randn(*shape, 70, dtype=torch.float64)
    with parity.TruncatedProducts():
        found = parity._run_plain(case, wide, Outputs(dy))

    def cut(array):
        return truncated(torch.from_numpy(np.ascontiguousarray(array))).numpy()

    x, w_down, w_up = (wide[name].numpy() for name in ("x", "down_weight", "up_weight"))
    x, g = x.reshape(-1, 70), dy.reshape(-1, 70).numpy()
    b_down, b_up = (
        wide[name].numpy() if name in wide else 0.0 for name in ("down_bias", "up_bias")
    )
    z = cut(x) @ cut(w_down).T + b_down
    da = cut(g) @ cut(w_up)
    wanted = {
        "y": cut(z) @ cut(w_up).T + b_up,
        "dx": cut(da) @ cut(w_down),
        "d_down_weight": cut(da).T @ cut(x),
        "d_up_weight": cut(g).T @ cut(z),
    }
    if bias == "both":
        wanted |= {"d_down_bias": da.sum(0), "d_up_bias": g.sum(0)}
    for name, value in wanted.items():
        tensor = found[name].detach().reshape(value.shape).numpy()
        np.testing.assert_allclose(tensor, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tf32_tolerates_truncated_operands_and_not_much_more(monkeypatch, scale):
    """A composition whose operands are cut off is within the tolerance; where it is off by two and
    a half times as much, y is not."""
    case = Case(tf32=True)
    plain = parity._run_plain

    def run(case, tensors, upstream, backend):
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        exact = plain(case, wide, Outputs(upstream.y.double()))
        with parity.TruncatedProducts():
            cut = plain(case, wide, Outputs(upstream.y.double()))
        return {n: (exact[n] + scale * (cut[n] - exact[n])).float() for n in exact}

    monkeypatch.setattr(parity, "_run_backend", run)
    assert missed(case) == (set() if scale == 1.0 else {"y", "y (no grad)"})
    assert missed(replace(case, tf32=False)) >= {"y", "dx", "d_down_weight", "d_up_weight"}


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("tf32", [False, True])
def test_precision_sets_float32_products_and_restores_the_setting(before, tf32):
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        with Case(tf32=tf32).precision(torch.device("cpu")):
            assert allow_tf32() is tf32
        assert torch.get_float32_matmul_precision() == before
        with Case(torch.float16).precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(outside)


def test_tf32_holds_while_the_backend_runs_forward_and_backward(monkeypatch):
    seen = []
    for name in ("forward", "backward"):
        method = getattr(ReferenceBackend, name)

        def watched(self, *arguments, method=method):
            seen.append(allow_tf32())
            return method(self, *arguments)

        monkeypatch.setattr(ReferenceBackend, name, watched)
    check_case(Case(tf32=True), "reference")
    assert seen == [True] * 3
    check_case(Case(), "reference")
    assert seen[3:] == [False] * 3
