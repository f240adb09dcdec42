"""Calls of every kind that launches tell apart: what Triton's specialisation reads, and all else
that the plans and the arguments of a launch follow from.
"""

import torch

HALF = torch.bfloat16
# On a GPU of one SM a row block and a split take few tokens, and little memory, for each.
ROW_BLOCK, SPLIT = (64, 32, 16), (8, 256, 16)


def tensor(*shape, dtype=HALF, offset=0):
    """`offset` elements behind an address that divides by 64."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + offset, dtype=dtype)[offset:].view(shape)


def parts(tokens, hidden, bottleneck, dtype=HALF, offset=0, bias=True, **changes):
    given = {
        "x": tensor(tokens, hidden, dtype=dtype, offset=offset),
        "down_weight": tensor(bottleneck, hidden, dtype=dtype),
        "up_weight": tensor(hidden, bottleneck, dtype=dtype),
        "down_bias": tensor(bottleneck, dtype=dtype) if bias else None,
        "up_bias": tensor(hidden, dtype=dtype) if bias else None,
    }
    return {**given, **changes}


def strided(tokens, hidden, width):
    return tensor(tokens, width)[:, :hidden]


def same_twice(tokens, hidden, bottleneck):
    other = tensor(tokens, hidden)
    return parts(tokens, hidden, bottleneck, residual=other, skip=other)


def x_as_skip(tokens, hidden, bottleneck):
    given = parts(tokens, hidden, bottleneck)
    return {**given, "skip": given["x"]}


# All that Triton's specialisation reads, and all else that a launch depends on.
KINDS = {
    "plain": parts,
    "without-bias": lambda t, h, r: parts(t, h, r, bias=False),
    "one-bias": lambda t, h, r: parts(t, h, r, up_bias=None),
    "x-not-aligned": lambda t, h, r: parts(t, h, r, offset=1),
    "x-aligned-to-8-bytes": lambda t, h, r: parts(t, h, r, offset=4),
    "bias-not-aligned": lambda t, h, r: parts(t, h, r, up_bias=tensor(h, offset=3)),
    "odd-sizes": lambda t, h, r: parts(t, h + 1, r + 1),
    "odd-tokens": lambda t, h, r: parts(t + 1, h, r),
    "one-token": lambda t, h, r: parts(1, h, r),
    "one-unit": lambda t, h, r: parts(t, h, 1),
    "one-feature": lambda t, h, r: parts(t, 1, r),
    "three-dimensions": lambda t, h, r: parts(t, h, r, x=tensor(2, t // 2, h)),
    "stride-of-sixteens": lambda t, h, r: parts(t, h, r, x=strided(t, h, 2 * h)),
    "odd-stride": lambda t, h, r: parts(t, h, r, x=strided(t, h, h + 1)),
    "no-stride": lambda t, h, r: parts(t, h, r, x=tensor(1, h).expand(t, h)),
    "transposed": lambda t, h, r: parts(t, h, r, x=tensor(h, t).T),
    "residual": lambda t, h, r: parts(t, h, r, residual=tensor(t, h)),
    "residual-strided": lambda t, h, r: parts(t, h, r, residual=strided(t, h, h + 1)),
    "no-residual": lambda t, h, r: parts(t, h, r, residual=None),
    "skip": lambda t, h, r: parts(t, h, r, skip=tensor(t, h)),
    "both": lambda t, h, r: parts(t, h, r, residual=tensor(t, h), skip=tensor(t, h)),
    "both-are-one": same_twice,
    "skip-is-x": x_as_skip,
    "float32-residual": lambda t, h, r: parts(t, h, r, residual=tensor(t, h, dtype=torch.float32)),
    "float16": lambda t, h, r: parts(t, h, r, dtype=torch.float16),
    "float32": lambda t, h, r: parts(t, h, r, dtype=torch.float32),
    "float32-weights": lambda t, h, r: parts(
        t, h, r, down_weight=tensor(r, h, dtype=torch.float32)
    ),
    "half-a-scale": lambda t, h, r: parts(t, h, r, scaling=0.5),
    "two-scales": lambda t, h, r: parts(t, h, r, scaling=2.0),
    "a-scale-of-zero": lambda t, h, r: parts(t, h, r, scaling=0.0),
    "a-scale-of-minus-zero": lambda t, h, r: parts(t, h, r, scaling=-0.0),
    "learned-scaling": lambda t, h, r: parts(t, h, r, scaling=tensor(1)),
    "channel-scaling": lambda t, h, r: parts(t, h, r, scaling=tensor(h)),
    "relu": lambda t, h, r: parts(t, h, r, activation="relu"),
}
OF_THE_SPLIT_FORM = (
    "plain",
    "x-not-aligned",
    "odd-sizes",
    "residual",
    "both-are-one",
    "transposed",
)
LIKE_ANOTHER = {"three-dimensions", "x-aligned-to-8-bytes"}  # in what is launched
COPIES = {"transposed"}  # before it launches, so it is not repeated
