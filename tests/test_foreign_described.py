"""Modules of the user's own, described by the names of their parts."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapterkern import UnsupportedAdapterError
from adapterkern.integrations import foreign

H, R = 12, 5
NAMES = {"down": "fc1", "activation": "act", "up": "fc2"}


class Mine(nn.Module):
    """y = x + scale * drop(fc2(act(fc1(x)))), with whatever is changed about it."""

    def __init__(self, act=None, scale=1.0, p=0.0, adds=True, bias=True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(H, R, bias=bias), nn.Linear(R, H, bias=bias)
        self.act = nn.GELU() if act is None else act
        self.drop, self.scale, self.adds = nn.Dropout(p), scale, adds
        nn.init.zeros_(
            self.fc2.weight
        )  # as adapters start: what it computes must show all the same

    def forward(self, x):
        u = self.drop(self.fc2(self.act(self.fc1(x)))) * self.scale
        return x + u if self.adds else u


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, H)


def same(module, adapter, x, **options) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    y, expected = adapter(x, **options), module(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().sum(), parameters)
    for one, other in zip(
        found, torch.autograd.grad(expected.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("act", "given"),
    [
        (None, "act"), (nn.ReLU(), "act"), (F.silu, "act"), (torch.tanh, torch.tanh),
        (F.gelu, "gelu"), (F.silu, "swish"), (nn.Tanh(), nn.Tanh()),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_new"),
    ],
)  # fmt: skip
def test_an_activation_is_a_submodule_a_function_or_a_name(x, act, given, bias):
    module = Mine(act, bias=bias)
    adapter = foreign.from_module(module, **NAMES | {"activation": given})
    assert adapter.up_proj.weight is module.fc2.weight
    same(module, adapter, x)


@pytest.mark.parametrize(
    ("scale", "given"),
    [
        (0.5, 0.5),
        (0.5, "scale"),
        (nn.Parameter(torch.ones(1)), "scale"),
        (nn.Parameter(torch.ones(H)), "scale"),
    ],
)
def test_a_scaling_is_a_number_or_a_name(x, scale, given):
    module = Mine(scale=scale)
    adapter = foreign.from_module(module, **NAMES, scaling=given)
    assert (adapter.scaling is scale) or adapter.scaling == 0.5
    same(module, adapter, x)


def test_names_may_be_those_of_parts_of_parts(x):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.tied = Mine(), None
            self.tied = self.inner.fc1  # one parameter under two names

        def forward(self, x):
            return self.inner(x)

    module = Outer()
    named = {key: f"inner.{name}" for key, name in NAMES.items()}
    same(module, foreign.from_module(module, **named), x)


def test_what_the_module_adds_itself_is_told(x):
    module = Mine(adds=False)
    with pytest.raises(UnsupportedAdapterError) as raised:
        foreign.from_module(module, **NAMES)
    assert str(raised.value) == (
        "Mine has no BottleneckAdapter: the module does not add its input, and residual='input' "
        "says otherwise.\n  hint: residual=None; its output is then adapter(x, residual=None)"
    )
    same(module, foreign.from_module(module, **NAMES, residual=None), x, residual=None)
    with pytest.raises(UnsupportedAdapterError, match=r"adds its input(.|\n)*then adapter\(x\)$"):
        foreign.from_module(Mine(), **NAMES, residual=None)


def test_dropout_is_that_of_the_up_projection():
    module = Mine(p=0.25, scale=3.0)
    adapter = foreign.from_module(module, **NAMES, scaling="scale", dropout="drop")
    assert (adapter.dropout, adapter.training, module.drop.p) == (0.25, True, 0.25)
    assert not module.drop._forward_pre_hooks
    later = DropsLast(p=0.25, scale=3.0)
    assert foreign.from_module(later, **NAMES, scaling="scale", dropout="drop").dropout == 0.25
    with pytest.raises(
        UnsupportedAdapterError, match=r"in training its output differs(.|\n)*drop "
    ):
        foreign.from_module(module, **NAMES, scaling="scale")


class DropsLast(Mine):
    def forward(self, x):
        return x + self.drop(self.fc2(self.act(self.fc1(x))) * self.scale)


class Flattens(Mine):
    def forward(self, x):
        return super().forward(x.flatten(0, -2))


def test_a_module_of_tokens_alone_is_compared(x):
    module = Flattens()
    torch.testing.assert_close(foreign.from_module(module, **NAMES)(x)[0], module(x)[:3])


class DropsInside(Mine):
    def forward(self, x):
        return x + self.fc2(self.drop(self.act(self.fc1(x))))


class DropsSilently(Mine):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class Normed(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Gated(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.gate * self.fc2(self.act(self.fc1(x)))


class Approximate(Mine):
    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Never(Mine):
    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class TwoInputs(Mine):
    def forward(self, x, residual):
        return residual + self.fc2(self.act(self.fc1(x)))


class Tuple(Mine):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (DropsInside(p=0.5), {"dropout": "drop"}, "does not drop out of the up-projection"),
        (Never(p=0.5), {"dropout": "drop"}, "does not drop out of the up-projection"),
        (DropsSilently(), {}, "in training its output differs"),
        (Normed(), {}, r"in evaluation its output differs .*\n.*norm \(LayerNorm\)"),
        (Gated(), {}, "in evaluation its output differs"),
        (Approximate(), {}, r"in evaluation its output differs .* by \de-0[345] of"),
        (Mine(scale=2.0), {}, "in evaluation its output differs"),
        (Mine(scale=2.0), {"scaling": 3.0}, "in evaluation its output differs"),
        (TwoInputs(), {}, "a call with x alone gives no y: TypeError.*\n.*check=False takes"),
        (Tuple(), {}, "gives no y: tuple"),
        (Mine(), {"down": "fc2", "up": "fc1"}, "gives no y: RuntimeError"),
        (Mine(nn.Mish()), {}, r"Mish.*no fused form"),
        (Mine(), {"dropout": "fc1"}, "its dropout is a Linear"),
        (Mine(scale=nn.Parameter(torch.ones(()))), {"scaling": "scale"}, r"shape \[\], not \[1\]"),
        (Mine(), {"down": "act"}, "a projection is a GELU"),
    ],
)  # fmt: skip
def test_what_computes_something_else_is_refused(module, options, message):
    modes = [part.training for part in module.modules()]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seed = torch.get_rng_state()
    with pytest.raises(UnsupportedAdapterError) as raised:
        foreign.from_module(module, **NAMES | options)
    assert torch.equal(torch.get_rng_state(), seed)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert re.search(message, str(raised.value)), str(raised.value)


def test_projections_that_do_not_meet_are_refused():
    module = Mine()
    module.fc2 = nn.Linear(R + 1, H)
    with pytest.raises(UnsupportedAdapterError, match=f"gives {R} features, .* takes {R + 1}"):
        foreign.from_module(module, **NAMES)


def test_unchecked_the_description_is_taken_at_its_word(x):
    module = TwoInputs()
    adapter = foreign.from_module(module, **NAMES, check=False)
    torch.testing.assert_close(adapter(x, residual=2 * x), module(x, 2 * x))


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=["bf16", "meta"]
)
def test_weights_of_any_dtype_and_none_at_all_are_compared(options):
    module = Approximate().to(**options)
    with pytest.raises(UnsupportedAdapterError, match="in evaluation its output differs"):
        foreign.from_module(module, **NAMES)
    module = Mine().to(**options)
    adapter = foreign.from_module(module, **NAMES)
    assert adapter.down_proj.weight is module.fc1.weight
    assert module.fc1.weight.dtype == options.get("dtype", torch.float32)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"down": "fc3"}, ValueError, "down must be the name of a submodule of Mine, got 'fc3'.\n"
         "  hint: it has fc1 (Linear), fc2 (Linear), act (GELU), drop (Dropout)"),
        ({"up": nn.Linear(2, 2)}, TypeError, "up must be the name of a submodule, got Linear("),
        ({"activation": "jelly"}, ValueError, "activation must be the name of a submodule, of a "
         "function that the module holds, or of an activation, got 'jelly'.\n  hint: it has fc1"),
        ({"activation": 7}, TypeError, "activation must be a name or a function, got 7"),
        ({"activation": None}, TypeError, "a description needs down, activation and up; "
         "activation is missing."),
        ({"scaling": "fc1"}, ValueError, "got 'fc1', which is a Linear"),
        ({"scaling": "nothing"}, ValueError, "got 'nothing', which is a NoneType"),
        ({"scaling": True}, ValueError, "got True"),
        ({"dropout": "dorp"}, ValueError, "dropout must be the name of a submodule of Mine"),
        ({"residual": "x"}, ValueError, "residual must be \"input\" or None, got 'x'"),
    ],
)  # fmt: skip
def test_wrong_names_are_told_with_those_that_there_are(given, kind, message):
    with pytest.raises(kind) as raised:
        foreign.from_module(Mine(), **NAMES | given)
    assert message in str(raised.value)


def test_what_is_no_module_is_a_type_error():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got str"):
        foreign.from_module("Mine", **NAMES)
    with pytest.raises(TypeError, match=r"from_module\(module, down=\.\.\., activation"):
        foreign.from_module(Mine())
