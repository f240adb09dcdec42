"""What the decision on a call remembers: a call unlike the first is decided anew."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from eager import eager_adapter, tensors

import adapterkern as ak
from adapterkern import dispatch
from adapterkern.spec import TENSOR_NAMES, make_call

OTHERS = [name for name in TENSOR_NAMES if name != "x"]


def every_tensor(**options):
    given = tensors((3,), residual=True, skip=True, scaling=10, **options)
    return {name: tensor.detach() for name, tensor in given.items()}


class Wrapper(torch.Tensor):
    """A subclass with operations of its own, of the sizes and dtype of the tensor within."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [a.inner if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("name", OTHERS)
def test_a_tensor_on_another_device_is_not_taken_for_the_first_one(spy, name):
    given = every_tensor(norm=True)
    ak.bottleneck_adapter_norm(**given)
    with pytest.raises(
        ValueError, match=f"all tensors must be on one device, got .*{name} on meta"
    ):
        ak.bottleneck_adapter_norm(**given | {name: given[name].to("meta")})
    assert len(spy.forwards) == 1


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_tensor_of_another_dtype_is_not_taken_for_the_first_one(spy, name):
    given = every_tensor(norm=True)
    ak.bottleneck_adapter_norm(**given)
    with pytest.raises(ValueError, match="float"):
        ak.bottleneck_adapter_norm(**given | {name: given[name].float()})
    assert len(spy.forwards) == 1


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_tensor_of_another_layout_is_not_taken_for_the_first_one(spy, name):
    given = every_tensor(norm=True)
    ak.bottleneck_adapter_norm(**given)
    with pytest.raises(ValueError, match=f"{name} must be a dense"):
        ak.bottleneck_adapter_norm(**given | {name: given[name].to_sparse()})
    assert len(spy.forwards) == 1


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_tensor_of_another_class_is_not_taken_for_the_first_one(spy, name):
    """Plain operations run, which the class sees; a kernel would read memory that is not there."""
    given = every_tensor(norm=True)
    ak.bottleneck_adapter_norm(**given)
    given[name] = Wrapper(given[name])
    norm = {n: given.pop(n) for n in ("norm_weight", "norm_bias")}
    call = make_call(**given)._replace(norm="layer", **norm)
    decision = dispatch.select(call)
    assert (decision.backend, decision.plain) == ("reference", True)
    with pytest.raises(ak.BackendUnsupportedError, match="tensor_subclass"):
        dispatch.select(call, "triton")


def test_a_transform_is_not_taken_for_a_plain_call(spy):
    """Of tensors that look the same: the transform closes over them."""
    given = every_tensor()
    ak.bottleneck_adapter(**given)
    decisions = []

    def function(_):
        decisions.append(dispatch.select(make_call(**given)))
        return torch.zeros(())

    torch.func.vmap(function)(torch.zeros(2))
    with torch.autograd.forward_ad.dual_level():
        function(None)
    assert [(d.backend, d.plain) for d in decisions] == [("reference", True)] * 2
    assert ["functorch" in d.spec.features for d in decisions] == [True, False]
    assert ["forward_ad" in d.spec.features for d in decisions] == [False, True]


@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "after-another"])
@pytest.mark.parametrize("zero", [np.float32(0), np.float64(0), 0, Fraction(0)], ids=repr)
def test_a_dropout_is_any_real_number_whatever_came_before(cached, zero):
    given = every_tensor()
    if cached:
        ak.bottleneck_adapter(**given)
    y = ak.bottleneck_adapter(**given, dropout=zero)
    torch.testing.assert_close(y, eager_adapter(**given))


@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "after-another"])
@pytest.mark.parametrize("value", [Decimal(0), False, "0", None, 0j], ids=repr)
@pytest.mark.parametrize("name", ["dropout", "scaling"])
def test_what_is_no_real_number_is_refused_whatever_came_before(cached, name, value):
    given = every_tensor()
    del given["scaling"]
    if cached:
        ak.bottleneck_adapter(**given)
        ak.bottleneck_adapter(**given, scaling=0.0)
    with pytest.raises(TypeError, match=f"{name} must be a .*, got {re.escape(repr(value))}"):
        ak.bottleneck_adapter(**given, **{name: value})


@pytest.mark.parametrize("value", [np.float32(0.5), Fraction(1, 2), 2, np.int64(3)], ids=repr)
def test_a_scaling_is_any_real_number(value):
    given = every_tensor()
    del given["scaling"]
    y = ak.bottleneck_adapter(**given, scaling=value)
    torch.testing.assert_close(y, eager_adapter(**given, scaling=float(value)))
    assert type(ak.BottleneckAdapter(8, 4, scaling=value).scaling) is float


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), np.float32("nan"), 10**400], ids=str
)
def test_a_scaling_that_is_not_finite_is_refused_by_name(value):
    given = every_tensor()
    del given["scaling"]
    ak.bottleneck_adapter(**given, scaling=0.5)  # a later one of this kind costs one lookup
    with pytest.raises(ValueError, match="scaling must be"):
        ak.bottleneck_adapter(**given, scaling=value)


def test_a_scaling_that_changes_is_decided_once():
    given = every_tensor()
    del given["scaling"]
    for step in range(50):
        ak.bottleneck_adapter(**given, scaling=0.01 * (step + 1))
    assert len(dispatch._decisions) == 1
