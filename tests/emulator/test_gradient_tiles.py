"""The weight gradients depend on the values of x and dy alone, not on how these lie in memory."""

import itertools

import cuda_emulator
import pytest
import torch
from emulated import emulated

from adapterkern.backends import get
from adapterkern.backends.cuda.facts import Device
from adapterkern.parity import Case
from adapterkern.results import Gradients, Needs, Outputs, Saved
from adapterkern.spec import AdapterCall

PARAMETERS = ("down_weight", "up_weight", "down_bias", "up_bias", "scaling")
MANY_STAGES = Device(12, memory=227 * 1024)
TOKENS, BOTTLENECK = 530, 20


def unaligned(rows: torch.Tensor) -> torch.Tensor:
    """Return the same rows, each beginning one element past a multiple of 16 bytes."""
    room = rows.new_empty(len(rows), -(-rows.shape[1] // 8) * 8 + 8)
    room[:, 1 : 1 + rows.shape[1]] = rows
    return room[:, 1 : 1 + rows.shape[1]]


def padded(rows: torch.Tensor) -> torch.Tensor:
    """Return the same rows at multiples of 16 bytes; NaN lies between them."""
    room = rows.new_empty(len(rows), -(-rows.shape[1] // 8) * 8 + 8)
    room[:, : rows.shape[1]] = rows
    return room[:, : rows.shape[1]]


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "padded": padded,
    "unaligned": unaligned,
    "float32": torch.Tensor.float,
    "float32 unaligned": lambda rows: unaligned(rows.float()),
}


def prepared(hidden: int, dtype: torch.dtype) -> tuple[AdapterCall, Saved, torch.Tensor]:
    sizes = {"shape": (TOKENS,), "hidden_size": hidden, "bottleneck_size": BOTTLENECK}
    case = Case(dtype, scaling="channel", **sizes)
    call = case.make_call(case.draw("cpu", seed=0))
    _, saved = get("cuda").forward(call, save=True)
    return call, saved, case.draw("cpu", seed=1)["x"]


def gradients(call: AdapterCall, saved: Saved, dy: torch.Tensor) -> Gradients:
    needs = Needs(**dict.fromkeys(PARAMETERS, True))
    return get("cuda").backward(call, saved, Outputs(dy), needs)


@pytest.mark.thorough
@pytest.mark.parametrize("device", [Device(12), MANY_STAGES], ids=["few stages", "many stages"])
@pytest.mark.parametrize("hidden", [264, 75])
def test_weight_gradients_are_the_same_bits_however_x_and_dy_lie(kernels, device, hidden):
    """Copied in whole or partial vectors, converted from float32, or loaded by elements."""
    with emulated(kernels, device):
        call, saved, dy = prepared(hidden, torch.bfloat16)
        plain = gradients(call, saved, dy)
        for (x_name, of_x), (dy_name, of_dy) in itertools.product(LAYOUTS.items(), repeat=2):
            changed = call._replace(x=of_x(call.x))
            found = gradients(changed, saved, of_dy(dy))
            for name in PARAMETERS:
                same = torch.equal(getattr(found, name), getattr(plain, name))
                assert same, f"{name} of x {x_name}, dy {dy_name}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_weight_gradients_are_the_same_bits_in_every_order_of_the_warps(
    kernels, monkeypatch, dtype
):
    with emulated(kernels, MANY_STAGES):
        call, saved, dy = prepared(300, dtype)
        plain = gradients(call, saved, dy)
        for seed in cuda_emulator.SCHEDULES.values():
            monkeypatch.setattr(kernels, "seed", seed)
            found = gradients(call, saved, dy)
            for name in PARAMETERS:
                assert torch.equal(getattr(found, name), getattr(plain, name)), name
