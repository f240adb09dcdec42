"""adapterkern.dispatch: who runs a call, and what is said about it."""

import logging
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from eager import eager_adapter, tensors

import adapterkern as ak
from adapterkern import _env, dispatch
from adapterkern.backends import NAMES, get
from adapterkern.backends.base import Backend
from adapterkern.spec import AdapterSpec, make_call

REFERENCE_ONLY = ("dropout", "forward_ad", "functorch", "tensor_subclass")


def call(**options):
    return ak.bottleneck_adapter(**tensors((3,), dtype=torch.float32), **options)


def spec_on(device, **changes):
    fields = {
        "operation": "bottleneck_adapter", "device": torch.device(device),
        "hidden_size": 10, "bottleneck_size": 4,
        "activation": "gelu", "compute_dtype": torch.float32,
        "dtypes": (("x", torch.float32),), "features": frozenset({"bias", "input_residual"}),
    }  # fmt: skip
    return AdapterSpec(**fields | changes)


def in_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_registered_backend_loads_and_keeps_the_contract():
    assert NAMES == ("triton", "cuda", "reference")
    for name in NAMES:
        backend = get(name)
        assert isinstance(backend, Backend)
        assert backend.name == name
        assert get(name) is backend


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
def test_kernel_backends_leave_to_the_reference_what_only_it_can_do(name):
    assert not get(name).features & set(REFERENCE_ONLY)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown backend 'cublas'"):
        call(backend="cublas")
    with (
        pytest.raises(ValueError, match="unknown backend 'cublas'"),
        ak.use_backend("cublas"),
    ):
        pass


def test_backends_gives_a_reason_for_every_one_that_cannot_run():
    reasons = ak.backends()
    assert tuple(reasons) == NAMES
    assert reasons["reference"] is None
    for name in NAMES:
        assert reasons[name] == get(name).unavailable_reason()
        assert reasons[name] is None or len(reasons[name]) > 10


def test_named_backend_raises_with_every_reason(spy):
    spy.activations, spy.features = frozenset({"relu"}), frozenset({"bias"})
    with pytest.raises(ak.BackendUnsupportedError) as caught:
        ak.bottleneck_adapter(**tensors((3,), scaling=1), backend="triton")
    spy.dtypes = frozenset({torch.float32})
    with pytest.raises(ak.BackendUnsupportedError) as caught:
        ak.bottleneck_adapter(**tensors((3,), scaling=10), backend="triton")
    text = str(caught.value)
    assert text.startswith('backend "triton" cannot run this call (H=10 R=4 gelu float64 on cpu')
    for reason in (
        'activation "gelu" is not implemented (has: relu)',
        "dtype float64 is not supported (has: float32)",
        'feature "input_residual" is not implemented (has: bias)',
        'feature "learned_scaling" is not implemented (has: bias)',
        'feature "scaling" is not implemented (has: bias)',
    ):
        assert f"\n  - {reason}" in text
    assert not spy.forwards
    assert isinstance(caught.value, RuntimeError)


def test_a_backend_on_another_device_says_so():
    reasons = Backend.unsupported_reasons(get("triton"), spec_on("meta"))
    assert any(reason.startswith("device meta is not supported (has: c") for reason in reasons)


def test_auto_takes_the_first_backend_that_can(spy):
    call()
    assert len(spy.forwards) == 1
    spy.activations = frozenset({"relu"})
    call(activation="silu")
    assert len(spy.forwards) == 1  # the reference ran it
    call(activation="relu")
    assert len(spy.forwards) == 2


def test_a_feature_is_declared_by_what_is_named_or_by_a_kernel_of_that_device(spy):
    assert dispatch.is_declared("layer_norm", "cpu")
    assert not dispatch.is_declared("layer_norm", "xpu")
    assert not dispatch.is_declared("dropout", "cpu")  # of the reference alone
    with ak.use_backend("reference"):
        assert dispatch.is_declared("dropout", "xpu")
    spy.features = spy.features - {"layer_norm"}
    assert not dispatch.is_declared("layer_norm", "cpu")
    with ak.use_backend("triton"):
        assert dispatch.is_declared("rms_norm", "cpu")
        assert not dispatch.is_declared("layer_norm", "cpu")


def test_named_reference_comes_before_kernels(spy):
    call(backend="reference")
    assert not spy.forwards


def test_backward_runs_where_its_forward_ran(spy):
    arguments = tensors((3,))
    with ak.use_backend("triton"):
        y = ak.bottleneck_adapter(**arguments)
    with ak.use_backend("reference"):
        y.sum().backward()
    assert len(spy.backwards) == 1
    with ak.use_backend("reference"):
        y = ak.bottleneck_adapter(**arguments)
    y.sum().backward()
    assert len(spy.backwards) == 1


def test_use_backend_nests_and_survives_exceptions(spy):
    def ran_on_spy():
        before = len(spy.forwards)
        call()
        return len(spy.forwards) > before

    with ak.use_backend("reference"):
        assert not ran_on_spy()
        with ak.use_backend("triton"):
            assert ran_on_spy()
            with ak.use_backend("auto"):
                assert ran_on_spy()
        assert not ran_on_spy()
        with pytest.raises(KeyError), ak.use_backend("triton"):
            raise KeyError
        assert not ran_on_spy()
    assert ran_on_spy()


def test_a_name_in_the_call_comes_before_use_backend(spy):
    with ak.use_backend("reference"):
        call(backend="triton")
    assert len(spy.forwards) == 1


def test_a_decision_is_made_once_and_not_for_another_scale_or_batch(spy):
    for batch, scale in ((3, 0.5), (4, 0.25), (3, 2.0)):
        arguments = tensors((batch,), seed=batch)
        y = ak.bottleneck_adapter(**arguments, scaling=scale)
        torch.testing.assert_close(y, eager_adapter(**arguments, scaling=scale))
    assert len(dispatch._decisions) == 1
    ak.bottleneck_adapter(**tensors((3,)), scaling=1.0)
    assert len(dispatch._decisions) == 2


def test_decisions_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_DECISIONS", 5)
    for hidden in range(1, 13):
        given = torch.ones(2, hidden), torch.ones(1, hidden), torch.ones(hidden, 1)
        y = ak.bottleneck_adapter(*given, activation="identity")
        torch.testing.assert_close(y, torch.full((2, hidden), 1.0 + hidden))
        assert len(dispatch._decisions) <= 5


@pytest.mark.thorough
def test_environment_names_the_backend():
    code = (
        "import torch, adapterkern as ak\n"
        "adapter = ak.BottleneckAdapter(8, 2)\n"
        "print(ak.explain(adapter, torch.zeros(1, 8)).backend)\n"
        "adapter(torch.zeros(1, 8))"
    )
    ran = in_new_process(code, ADAPTERKERN_BACKEND="reference")
    assert ran.stdout == "reference (named)\n", ran.stderr
    ran = in_new_process(code, ADAPTERKERN_BACKEND=" CUDA ", TRITON_INTERPRET="0")
    assert ran.stdout == "none: cuda was named and raises\n"
    assert 'BackendUnsupportedError: backend "cuda" cannot run this call' in ran.stderr


def test_fallback_on_a_gpu_is_logged_once_per_reason(monkeypatch, clean_dispatch, caplog):
    monkeypatch.setattr(_env, "STRICT", "0")
    caplog.set_level(logging.WARNING, "adapterkern")
    float64 = {"compute_dtype": torch.float64, "dtypes": (("x", torch.float64),)}
    for _ in range(3):
        for hidden in (10, 20):
            dispatch._decide(spec_on("cuda", hidden_size=hidden, **float64), "auto")
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert text.startswith("the PyTorch reference runs H=10 R=4 gelu float64 on cuda")
    assert "triton: " in text
    assert "dtype float64 is not supported (has: bfloat16, float16, float32)" in text
    dispatch._decide(spec_on("cuda", features=frozenset({"functorch"})), "auto")
    assert len(caplog.records) == 2
    assert 'feature "functorch" is not implemented' in caplog.records[1].getMessage()


def test_reference_on_the_cpu_is_no_fallback(monkeypatch, clean_dispatch, caplog):
    monkeypatch.setattr(_env, "STRICT", "1")
    call()
    torch.func.grad(lambda x: ak.bottleneck_adapter(x, torch.ones(2, 3), torch.ones(3, 2)).sum())(
        torch.ones(3)
    )
    assert not caplog.records


def test_dropout_says_once_that_the_reference_runs(clean_dispatch, caplog):
    for probability in (0.1, 0.1, 0.2):
        call(dropout=probability)
    assert len(caplog.records) == 1
    assert 'feature "dropout" is not implemented' in caplog.text


def test_strict_raises_where_the_reference_would_stand_in(monkeypatch, clean_dispatch):
    monkeypatch.setattr(_env, "STRICT", "1")
    with pytest.raises(
        ak.BackendUnsupportedError,
        match="ADAPTERKERN_STRICT=1 allows kernels alone, but the PyTorch reference runs",
    ):
        dispatch._decide(
            spec_on("cuda", features=frozenset({"dropout"}), activation="gelu"), "auto"
        )
    decided = dispatch._decide(spec_on("cuda"), "reference")  # named, so no fallback
    assert decided.backend == "reference"


@pytest.mark.parametrize("feature", REFERENCE_ONLY)
def test_what_only_autograd_can_do_runs_as_plain_operations(feature):
    assert dispatch._decide(spec_on("cpu", features=frozenset({feature})), "auto").plain
    assert not dispatch._decide(spec_on("cpu"), "auto").plain


def test_a_named_kernel_under_functorch_raises(spy):
    arguments = tensors((3,))

    def loss(x):
        return ak.bottleneck_adapter(**{**arguments, "x": x}, backend="triton").sum()

    with pytest.raises(ak.BackendUnsupportedError, match='feature "functorch" is not implemented'):
        torch.func.grad(loss)(arguments["x"])


class OtherCall(NamedTuple):
    """A second kind of call: four methods are all that it has in common with an adapter's."""

    x: torch.Tensor
    index: torch.Tensor
    rank: int = 4

    def tensors(self):
        return {"x": self.x, "index": self.index}

    def options(self):
        return {"rank": self.rank}

    def key(self):
        return self.x.dim(), self.x.shape[-1], self.x.dtype, self.rank

    def spec(self):
        if self.x.dim() != 2:
            raise ValueError(f"x must have shape [T, H], got {list(self.x.shape)}.")
        return spec_on(
            "cpu", operation="another", hidden_size=self.x.shape[1], features=frozenset()
        )


def other_call():
    return OtherCall(torch.zeros(3, 10), torch.zeros(3, dtype=torch.int32))


def test_a_second_kind_of_call_is_refused_by_every_backend_that_does_not_declare_it(clean_dispatch):
    with pytest.raises(ak.BackendUnsupportedError) as caught:
        dispatch.select(other_call())
    has = "bottleneck_adapter, grouped_bottleneck_adapter"
    reason = f"operation another is not implemented (has: {has})"
    assert f"reference: {reason}" in str(caught.value)
    for name in NAMES:
        with pytest.raises(ak.BackendUnsupportedError):
            dispatch.select(other_call(), name)
        reasons = Backend.unsupported_reasons(get(name), other_call().spec())
        assert reason in reasons
    assert ak.explain(other_call()).backend == "none: no backend can run it"
    assert not dispatch._decisions


def test_a_second_kind_of_call_is_chosen_and_remembered_like_the_first(spy):
    spy.operations = frozenset({"bottleneck_adapter", "another"})
    first = dispatch.select(other_call())
    assert first.backend == "triton"
    assert dispatch.select(other_call()) is first
    assert len(dispatch._decisions) == 1
    with pytest.raises(ValueError, match=r"x must have shape \[T, H\]"):
        dispatch.select(other_call()._replace(x=torch.zeros(10)))


def test_kinds_of_calls_do_not_share_a_decision_whatever_their_keys_are(spy):
    spy.operations = frozenset({"bottleneck_adapter", "another"})
    first = make_call(**tensors((3,)))

    class SameKey(OtherCall):
        def key(self):
            return first.key()

    assert dispatch.select(first).spec.operation == "bottleneck_adapter"
    assert dispatch.select(SameKey(*other_call())).spec.operation == "another"


def test_a_call_under_a_transform_does_not_take_the_decision_of_one_outside(spy):
    given = {name: t.detach() for name, t in tensors((3,)).items()}
    ak.bottleneck_adapter(**given)
    assert spy.forwards == [False]
    x = given.pop("x")
    torch.func.vmap(lambda row: ak.bottleneck_adapter(row, **given))(x)
    assert spy.forwards == [False]  # plain operations ran


def test_make_call_keeps_what_it_is_given():
    arguments = tensors((3,), residual=True)
    call = make_call(**arguments, activation="swish", scaling=2)
    assert (call.activation, call.scale, call.add_input) == ("silu", 2.0, False)
    assert call.residual is arguments["residual"]
