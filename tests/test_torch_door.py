"""adapterkern._torch: every private name is there, and public stand-ins give the same answers."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from host_work import Operations
from torch import nn
from torch.autograd import forward_ad

from adapterkern import _torch

ANSWERS = ("functorch_is_active", "forward_ad_is_active")


def both(name, *arguments):
    private, public = getattr(_torch, name), _torch.PUBLIC[name]
    assert private is not public, f"this torch lacks the private name behind _torch.{name}"
    return private(*arguments), public(*arguments)


@pytest.mark.parametrize("name", _torch.PUBLIC)
def test_this_torch_has_every_private_name(name):
    assert getattr(_torch, name) is not _torch.PUBLIC[name]


def test_neither_functorch_nor_forward_mode_is_active_in_a_plain_call():
    for name in ANSWERS:
        assert both(name) == (False, False)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jvp", "functionalize"])
def test_transforms_of_functorch_are_seen(transform):
    seen = []

    def function(x):
        seen.append(both("functorch_is_active"))
        return x.sum()

    x = torch.ones(2, 3)
    if transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    else:
        getattr(torch.func, transform)(function)(x)
    assert seen == [(True, True)]


def test_levels_of_forward_mode_are_seen():
    with forward_ad.dual_level():
        assert both("forward_ad_is_active") == (True, True)
    assert both("forward_ad_is_active") == (False, False)


def test_batched_gradients_are_seen():
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(both("is_batched", grad))
            return grad

    x = torch.ones(3, requires_grad=True)
    y = Watch.apply(x)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.eye(3))
    torch.autograd.grad(y, x, torch.ones(3))
    assert seen == [(True, True), (True, True), (False, False)]
    assert both("is_batched", torch.ones(0)) == (False, False)


class Named(torch.Tensor):
    pass


def test_what_is_watched_is_told_from_ordinary_calls():
    x = torch.ones(2)
    assert not _torch.is_watched(x)
    assert not _torch.is_watched(nn.Parameter(x))
    assert _torch.is_watched(x.as_subclass(Named))
    with Operations():
        assert _torch.is_watched(x)
    with torch.profiler.profile():
        assert _torch.is_watched(x)


HOOKS = {
    "register_forward_hook": lambda *_: None,
    "register_forward_pre_hook": lambda *_: None,
    "register_full_backward_hook": lambda *_: None,
    "register_full_backward_pre_hook": lambda *_: None,
}


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_on_a_module_are_seen_until_they_are_removed(register):
    linear = nn.Linear(2, 2)
    assert both("beyond_its_class", linear) == (None, None)
    handle = getattr(linear, register)(HOOKS[register])
    assert both("beyond_its_class", linear) == ("hooks", "hooks")
    handle.remove()
    assert both("beyond_its_class", linear) == (None, None)


def test_hooks_that_do_not_run_in_a_call_do_not_count():
    linear = nn.Linear(2, 2)
    linear.register_state_dict_pre_hook(lambda *_: None)
    linear.register_load_state_dict_post_hook(lambda *_: None)
    assert both("beyond_its_class", linear) == (None, None)


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_all_modules_are_seen(kind):
    linear = nn.Linear(2, 2)
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda *_: None)
    try:
        assert _torch.beyond_its_class(linear).startswith("hooks on all modules")
    finally:
        handle.remove()
    assert _torch.beyond_its_class(linear) is None


def test_a_forward_of_the_instance_is_seen():
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x
    assert both("beyond_its_class", nn.Identity(), linear) == ("a forward of its own",) * 2


def test_below_autograd_gives_the_same_tensors_both_ways():
    op = torch.ops.aten.mul.Tensor
    given = torch.ones(3, requires_grad=True)
    private, _ = _torch.below_autograd(lambda *a: (op(*a), None), given, given)
    (public,) = _torch.PUBLIC["below_autograd"](lambda *a: (op(*a),), given, given)
    for product in (private, public):
        assert not product.requires_grad
        assert not product.is_inference()
        assert product.tolist() == [1, 1, 1]


def test_subclasses_count_only_where_they_change_what_operations_do():
    rows = torch.ones(2, 3)
    nested = torch.nested.nested_tensor([rows], layout=torch.jagged)
    assert _torch.is_subclass(nested)
    for tensor in (rows, nn.Parameter(rows), rows.as_subclass(Named)):
        assert not _torch.is_subclass(tensor)


@pytest.mark.thorough
def test_the_package_is_right_by_public_ways_alone():
    """Autograd, functorch's transforms, forward mode and functional calls, in a process where every
    private name is replaced. Selective checkpointing looks at the op itself."""
    code = (
        "import sys, pytest\n"
        "from adapterkern import _torch, ops\n"
        "assert all(getattr(_torch, n) is f for n, f in _torch.PUBLIC.items())\n"
        "assert ops._apply == ops._BottleneckAdapter.apply\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    files = [f"tests/test_{n}.py" for n in ("torch_transforms", "torch_autograd", "functional")]
    ran = subprocess.run(
        [sys.executable, "-c", code, "-q", "-k", "not selective", *files],
        env={**os.environ, "ADAPTERKERN_PUBLIC_TORCH": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


@pytest.mark.parametrize("way", [_torch.current_stream, _torch.PUBLIC["current_stream"]])
def test_the_current_stream_is_that_of_the_device_asked_for(way, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda at: 70 + at, raising=False)
    streams = {at: SimpleNamespace(cuda_stream=70 + at) for at in range(3)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.get)
    assert [way(at) for at in range(3)] == [70, 71, 72]
