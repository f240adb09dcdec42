"""Tensors whose memory is not their values: negated views, and zeros that no memory holds."""

import pytest
import torch
from eager import eager_adapter, eager_adapter_norm, gradients, tensors

import adapterkern as ak
from adapterkern import _torch
from adapterkern.spec import TENSOR_NAMES

NAMES = (*TENSOR_NAMES, "upstream")


def negated(tensor):
    """A view of memory that holds the negatives of these values."""
    pairs = torch.stack([torch.zeros_like(tensor), -tensor], -1).detach()
    view = torch.view_as_complex(pairs).conj().imag
    assert view.is_neg()
    return view.requires_grad_(tensor.requires_grad)


def zeros(tensor):
    """Zeros without memory, as forward-mode AD makes them."""
    made = torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    assert made.data_ptr() == 0
    return made.requires_grad_(tensor.requires_grad)


KINDS = {"negated": negated, "zeros": zeros}


def in_memory(tensor):
    """The values that a kernel finds: those of the bits."""
    if tensor is None:
        return None
    assert not tensor._is_zerotensor(), "there is no memory"
    plain = torch.empty(0, dtype=tensor.dtype)
    plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return plain.clone()


@pytest.fixture
def kernel(spy, monkeypatch):
    """The spy, reading memory as kernels do."""
    forward, backward = spy.forward, spy.backward

    def read(call):
        found = {name: in_memory(t) for name, t in call.tensors().items()}
        return call._replace(**found)

    def from_memory(call, save):
        return forward(read(call), save)

    def back_from_memory(call, saved, upstream, needs):
        upstream = type(upstream)(*map(in_memory, upstream))
        return backward(read(call), saved, upstream, needs)

    monkeypatch.setattr(spy, "forward", from_memory)
    monkeypatch.setattr(spy, "backward", back_from_memory)
    return spy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_read_values(kernel, kind, name):
    given = tensors((3,), residual=True, skip=True, scaling=10, norm=True)
    upstream = torch.randn(3, 10, dtype=torch.float64)
    if name == "upstream":
        upstream = KINDS[kind](upstream)
    else:
        given[name] = KINDS[kind](given[name])
    y, found = gradients(ak.bottleneck_adapter_norm, given, upstream)
    wanted_y, wanted = gradients(eager_adapter_norm, given, upstream)
    torch.testing.assert_close(y, wanted_y)
    for tensor, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[tensor], msg=tensor)
    assert len(kernel.forwards) == len(kernel.backwards) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_kernels_read_values_where_nothing_is_recorded(kernel, kind, name):
    given = tensors((3,), residual=True, skip=True, scaling=10, norm=True)
    given = {n: t.detach() for n, t in given.items()}
    given[name] = KINDS[kind](given[name])
    torch.testing.assert_close(ak.bottleneck_adapter_norm(**given), eager_adapter_norm(**given))
    assert kernel.forwards == [False]


def test_an_input_that_is_its_own_residual_stays_so(kernel):
    x = negated(torch.randn(3, 10, dtype=torch.float64))
    given = {n: t for n, t in tensors((3,)).items() if n != "x"}
    y, found = gradients(lambda x: ak.bottleneck_adapter(x, **given, residual=x), {"x": x})
    wanted_y, wanted = gradients(lambda x: eager_adapter(x, **given), {"x": x})
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(found["x"], wanted["x"])


def test_parameters_of_a_module_may_be_such_views(kernel):
    adapter = ak.BottleneckAdapter(10, 4, init="bert")
    weight = adapter.down_proj.weight
    adapter.down_proj.weight = torch.nn.Parameter(negated(weight.detach()))
    assert adapter.down_proj.weight.is_neg()
    x = torch.randn(3, 10)
    y = adapter(x)
    torch.testing.assert_close(y, adapter(x, residual=None) + x)
    adapter.down_proj.weight = weight
    torch.testing.assert_close(y, adapter(x))


@pytest.mark.parametrize("private", [True, False])
def test_such_views_are_known(private):
    known = _torch.has_views_of_values if private else _torch.PUBLIC["has_views_of_values"]
    plain = torch.randn(3)
    assert not known([plain, torch.nn.Parameter(plain)])
    assert known([plain, negated(plain)])
    assert known([plain, zeros(plain)])


def test_the_oracle_of_this_file_reads_bits():
    plain = torch.randn(3)
    assert torch.equal(in_memory(negated(plain)), -plain)
