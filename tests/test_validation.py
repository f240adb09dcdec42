"""One wrong thing gives one sentence, and every error one hint: that of the cause."""

import pytest
import torch
from torch import zeros

import adapterkern as ak

H, R = 16, 4
SHAPES = {
    "x": (2, H),
    "down_weight": (R, H),
    "up_weight": (H, R),
    "down_bias": (R,),
    "up_bias": (H,),
}
PARAMETERS = tuple(SHAPES)[1:]


def message(**given) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        ak.bottleneck_adapter(**{name: zeros(shape) for name, shape in SHAPES.items()} | given)
    return str(caught.value)


def all_as(names=PARAMETERS, **options) -> dict:
    return {name: zeros(SHAPES[name], **options) for name in names}


WIDTH = (
    "down_weight must have shape [R, H] = [R, 9] to match x [2, 9], got [4, 16].\n"
    "  hint: both weights are for hidden_size 16; is x the one meant?"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"x": zeros(2, 9)}, WIDTH),
        ({"x": zeros(2, 9), "residual": zeros(2, H), "scaling": zeros(H)}, WIDTH),
        (
            all_as(dtype=torch.float16),
            "down_weight, up_weight, down_bias and up_bias are float16 but the computation runs in "
            "float32.\n  hint: convert one side, e.g. adapter.to(torch.float32), or use "
            "torch.autocast.",
        ),
        (
            {"x": zeros(2, H).double(), "skip": zeros(2, H), "scaling": zeros(1)},
            "down_weight, up_weight, down_bias, up_bias, skip and scaling are float32 but the "
            "computation runs in float64; float64 does not mix with other types.\n"
            "  hint: convert one side, e.g. adapter.to(torch.float64).",
        ),
        (
            {"residual": zeros(2, H).double(), "skip": zeros(2, H).double()},
            "residual and skip are float64 but the computation runs in float32; float64 does not "
            "mix with other types.\n  hint: convert one side.",
        ),
        (
            {"x": zeros(2, H, device="meta")},
            "all tensors must be on one device, got x on meta, down_weight on cpu, up_weight on "
            "cpu, down_bias on cpu, up_bias on cpu.\n"
            "  hint: x is on the meta device and has no values; make it where the adapter is.",
        ),
        (
            {"skip": zeros(2, H, device="meta")},
            "all tensors must be on one device, got x on cpu, down_weight on cpu, up_weight on "
            "cpu, down_bias on cpu, up_bias on cpu, skip on meta.\n  hint: use skip.to('cpu').",
        ),
        (
            all_as(("x", "down_weight"), dtype=torch.int32),
            "x and down_weight must be floating-point tensors (float32, float16, bfloat16, "
            "float64), got int32.\n  hint: convert it, as in x.float().",
        ),
        (
            {name: zeros(SHAPES[name]).to_sparse() for name in ("down_weight", "up_weight")},
            "down_weight and up_weight must be dense (strided) tensors, got sparse_coo.\n"
            "  hint: use down_weight.to_dense().",
        ),
        (
            {"residual": zeros(1, H), "skip": zeros(1, H)},
            "residual and skip must have the shape of x, [2, 16], got [1, 16].\n"
            "  hint: nothing is broadcast; use residual.expand_as(x).",
        ),
        (
            {"down_weight": zeros(R + 1, H)},
            "up_weight must have shape [H, R] = [16, 5] to match x [2, 16] and down_weight "
            "[5, 16], got [16, 4].",
        ),
        (
            {"down_weight": zeros(0, H), "up_weight": zeros(H, 0)},
            "hidden_size and bottleneck_size must be at least 1, got x [2, 16] and down_weight "
            "[0, 16].\n  hint: an adapter of size 0 is no adapter; leave it out.",
        ),
    ],
    ids=[
        *("width", "width-of-all", "half", "float64-x", "float64-added", "meta-x", "meta-skip"),
        *("integers", "sparse", "broadcast", "bottleneck", "empty"),
    ],
)  # fmt: skip
def test_one_wrong_thing_is_one_sentence_and_one_hint(given, expected):
    assert message(**given) == expected


def test_several_wrong_things_are_all_told_and_the_first_cure_comes_last():
    assert message(x=zeros(2, 9).double(), up_bias=zeros(3), dropout=2.0) == (
        "down_weight must have shape [R, H] = [R, 9] to match x [2, 9], got [4, 16].\n"
        "up_bias must have shape [16], got [3].\n"
        "down_weight, up_weight, down_bias and up_bias are float32 but the computation runs in "
        "float64; float64 does not mix with other types.\n"
        "dropout must be in [0, 1), got 2.0.\n"
        "  hint: both weights are for hidden_size 16; is x the one meant?"
    )
    assert message(down_bias=zeros(5), skip=zeros(2, 1)) == (
        "down_bias must have shape [4], got [5].\n"
        "skip must have the shape of x, [2, 16], got [2, 1].\n"
        "  hint: nothing is broadcast; use skip.expand_as(x)."
    )


def test_a_bias_that_fits_the_other_projection_is_not_counted_twice():
    text = message(down_weight=zeros(R + 1, H), down_bias=zeros(R + 2))
    assert "down_bias must have shape [5], got [6]." in text
    assert "up_weight must have shape [H, R] = [16, 5]" in text


@pytest.mark.parametrize("of_module", [False, True])
def test_a_scaling_that_no_float_holds_is_refused(of_module):
    if of_module:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
            ak.BottleneckAdapter(H, R, scaling=10**400)
        text, expected = str(caught.value), 'a float, "learned" or "channel"'
    else:
        text, expected = message(scaling=10**400), "a float or a tensor of shape [1] or [H]"
    assert text == f"scaling must be {expected}, got a number beyond all floats."


@pytest.mark.parametrize("factor", [1e-320, 1e-9])
def test_a_reduction_factor_that_no_bottleneck_size_fits_is_refused(factor):
    with pytest.raises(ValueError, match=f"up to 2147483648, got {factor} for hidden_size 16"):
        ak.BottleneckAdapter(H, reduction_factor=factor)


def test_nested_tensors_without_a_shape_are_refused_with_the_cure():
    nested = torch.nested.nested_tensor([zeros(2, H), zeros(3, H)], layout=torch.strided)
    text = message(x=nested)
    assert text.startswith("x must not be a nested tensor of strided layout, which has no shape.")
    assert "layout=torch.jagged works" in text
