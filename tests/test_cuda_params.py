"""The structs that cross into the CUDA extension are the same on both sides."""

import importlib
import math
import pkgutil
import re
import struct
from pathlib import Path

import cuda_facts
import pytest
import torch

from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import cuda
from adapterkern.backends.cuda import extension, launch_config, params
from adapterkern.backends.cuda.facts import Device, Problem, read_facts
from adapterkern.spec import NORMS

KINDS = [params.ForwardParams, params.BackwardParams, params.GroupedForwardParams]
FACTS = launch_config.facts  # before conftest.py puts those of the sources in its place
HEADER = (Path(__file__).resolve().parents[1] / "csrc" / "params.h").read_text()


def fields_of(struct_name: str) -> list[tuple[str, str]]:
    """Return (name, type) of every field of a struct of csrc/params.h, in order."""
    body = re.search(rf"struct {struct_name} {{(.*?)\n}};", HEADER, re.DOTALL)[1]
    code = re.sub(r"//.*", "", body)
    declarations = re.findall(r"(View|int64_t|float)\s+([^;]+);", code)
    return [(name.strip(), kind) for kind, names in declarations for name in names.split(",")]


def enumerators_of(enum_name: str) -> list[str]:
    body = re.search(rf"enum {enum_name} : int64_t {{(.*?)}}", HEADER, re.DOTALL)[1]
    return [re.sub("^k", "", name.strip()) for name in body.split(",") if name.strip()]


@pytest.mark.parametrize("kind", KINDS)
def test_params_have_the_fields_of_the_header_in_its_order(kind):
    types = {params.View: "View", int: "int64_t", float: "float"}
    ours = [(name, types[kind.__annotations__[name]]) for name in kind._fields]
    assert ours == fields_of(kind.__name__)


@pytest.mark.parametrize("kind", KINDS)
def test_no_view_is_at_the_start_of_a_struct(kind):
    """nvcc 13.0 lost choices between such a view and another one."""
    assert kind.__annotations__[kind._fields[0]] is int


@pytest.mark.parametrize("kind", KINDS)
def test_pack_puts_every_field_into_its_place(kind):
    """Each is 8 bytes wide: three of a view, then integers, and in two structs the scale as the one
    float."""
    numbers, given = iter(range(1, 1000)), {}
    for name, field in fields_of(kind.__name__):
        view = tuple(next(numbers) for _ in range(3)) if field == "View" else None
        given[name] = view or (0.5 if field == "float" else next(numbers))
    packed = kind(**given).pack()
    count = next(numbers) - 1
    scale = [0.5] if "scale" in kind._fields else []
    layout = f"={count}q" + "f4x" * len(scale)
    assert struct.unpack(layout, packed) == (*range(1, count + 1), *scale)


def test_codes_are_those_of_the_header():
    names = [str(dtype).removeprefix("torch.") for dtype in params.DTYPES]
    assert [*names, "tfloat32"] == [name.lower() for name in enumerators_of("DType")]
    assert [*params.DTYPES.values(), params.TFLOAT32] == [0, 1, 2, 3]
    words = [
        re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in enumerators_of("Activation")
    ]
    assert list(params.ACTIVATIONS) == words
    assert list(params.ACTIVATIONS.values()) == list(range(len(words)))


def test_norms_are_those_of_the_header_and_of_a_call():
    assert [name.lower() for name in enumerators_of("Norm")] == list(params.NORMS) == list(NORMS)
    assert list(params.NORMS.values()) == [0, 1, 2]


@pytest.mark.parametrize(("value", "stored"), [(1e-5, 9.999999747378752e-06), (-1.0, -1.0)])
def test_floats_cross_as_the_bits_of_a_float32(value, stored):
    assert struct.unpack("f4x", struct.pack("q", params.float_bits(value))) == (stored,)
    assert struct.unpack("f4x", struct.pack("q", params.float_bits(1e300))) == (math.inf,)


def test_every_code_is_of_an_activation_of_the_table():
    assert set(params.ACTIVATIONS) <= set(ACTIVATIONS)


def test_view_tells_address_dtype_and_row_stride():
    whole = torch.zeros(4, 10, dtype=torch.bfloat16)
    assert params.view(whole[:, 2:6]) == (whole.data_ptr() + 4, 2, 10)
    assert params.view(torch.zeros(2, 3, 5))[1:] == (0, 5)
    assert params.view(torch.zeros(7, dtype=torch.float16))[1:] == (1, 0)
    assert params.view(None) == (0, 0, 0)


def test_extension_refuses_bytes_of_another_struct():
    module, problem = extension.load()
    if module is None:
        pytest.skip(f"needs the extension: {problem}")
    sizes = (module.forward, 69), (module.backward, 114), (module.grouped_forward, 58)
    for function, words in sizes:
        with pytest.raises(ValueError, match=rf"expected the {8 * words} bytes .* got 3"):
            function(b"abc", 0, 0)


def test_extension_tells_the_facts_of_the_sources():
    module, problem = extension.load()
    if module is None:
        pytest.skip(f"needs the extension: {problem}")
    facts = read_facts(module.facts())
    assert facts == cuda_facts.of_the_sources()
    assert facts.row_block(Problem(1, 1, 20, True), Device(1)).width == 32


def test_no_module_keeps_facts_of_its_own():
    """Tests replace `launch_config.facts`, without which they need the extension."""
    for found in pkgutil.walk_packages(cuda.__path__, f"{cuda.__name__}."):
        module = importlib.import_module(found.name)
        assert module is launch_config or not hasattr(module, "facts"), found.name


def test_a_plan_without_the_extension_says_what_is_missing(monkeypatch):
    missing = extension.Loaded(None, "the CUDA extension is not built: nvcc not found.")
    monkeypatch.setattr(extension, "load", lambda: missing)
    with pytest.raises(RuntimeError, match="nvcc not found"):
        FACTS.__wrapped__()
