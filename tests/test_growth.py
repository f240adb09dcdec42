"""What happens to a field that is new to `AdapterCall`: all that is not taught it refuses it.

The package is copied, a field is added to the copy at the places that CONTRIBUTING names, and a
process runs the copy.
"""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapterkern
from adapterkern.ops import schema
from adapterkern.results import Gradients, Needs
from adapterkern.spec import OPTION_NAMES, TENSOR_NAMES, AdapterCall, make_call

PACKAGE = Path(adapterkern.__file__).parent

SCRIPT = """
import torch
import adapterkern as ak
from adapterkern import dispatch, ops
from adapterkern.backends import NAMES, get
from adapterkern.backends.base import Backend
from adapterkern.functional import run_call
from adapterkern.spec import make_call

x, down, up = torch.randn(3, 8), torch.randn(4, 8), torch.randn(8, 4)

def refusals(call):
    return [Backend.unsupported_reasons(get(name), call.spec()) for name in NAMES]

def raises(call):
    try:
        return run_call(call).y
    except ak.BackendUnsupportedError as error:
        return str(error)
"""


@pytest.fixture
def copy_of_the_package(tmp_path):
    """Edits copies of spec.py and results.py and runs a script there; what the script prints."""
    ignored = shutil.ignore_patterns("__pycache__", "cli", "bench", "integrations")
    shutil.copytree(PACKAGE, tmp_path / "adapterkern", ignore=ignored)

    def run(script, *edits):
        paths = [tmp_path / "adapterkern" / name for name in ("spec.py", "results.py")]
        for pattern, replacement in edits:
            changed = 0
            for path in paths:
                edited = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
                path.write_text(edited[0])
                changed += edited[1]
            assert changed == 1, pattern
        return subprocess.run(
            [sys.executable, "-c", SCRIPT + script], cwd=tmp_path, capture_output=True, text=True
        )

    return run


FIELD = (r"^    scale: float$", "    gate: Tensor | None\n    scale: float")
OF_NEEDS = (r"^    norm_bias: bool = False$", "    norm_bias: bool = False\n    gate: bool = False")
OF_GRADIENTS = (
    r"^    norm_bias: Tensor \| None = None$",
    "    norm_bias: Tensor | None = None\n    gate: Tensor | None = None",
)
OF_MAKER = (r"^    dropout: float = 0.0,$", "    dropout: float = 0.0,\n    gate=None,")
MADE = (r"^        scale,  # ", "        gate,\n        scale,  # ")
TENSOR = (FIELD, OF_NEEDS, OF_GRADIENTS, OF_MAKER, MADE)


@pytest.mark.thorough
def test_a_new_tensor_is_refused_by_every_backend_until_it_is_taught(copy_of_the_package):
    script = """
gates = [torch.ones(8, requires_grad=grad) for grad in (False, True, True)]
calls = [make_call(x, down, up, gate=gate) for gate in gates]
assert all('feature "gate" is not implemented' in str(r) for r in refusals(calls[0]))
assert all('"auto" cannot run this call' in raises(call) for call in calls)
assert len({call.key() for call in calls}) == 1, "a decision for every tensor"
assert calls[0].key() != make_call(x, down, up).key()
assert calls[0].key() != make_call(x, down, up, gate=torch.ones(1)).key()
assert "Tensor? gate" in str(torch.ops.adapterkern.forward.default._schema)
weight = down.clone().requires_grad_()
ak.bottleneck_adapter(x, weight, up).sum().backward()
eager = down.clone().requires_grad_()
(x + torch.nn.functional.gelu(x @ eager.T) @ up.T).sum().backward()
torch.testing.assert_close(weight.grad, eager.grad)
print("done")
"""
    ran = copy_of_the_package(script, *TENSOR)
    assert ran.stdout == "done\n", ran.stderr


@pytest.mark.thorough
@pytest.mark.parametrize(
    "missing", [OF_NEEDS, OF_GRADIENTS, MADE], ids=["needs", "gradients", "made"]
)
def test_a_new_tensor_that_is_forgotten_somewhere_stops_the_first_call(
    copy_of_the_package, missing
):
    edits = [edit for edit in TENSOR if edit is not missing]
    ran = copy_of_the_package("ak.bottleneck_adapter(x, down, up)", *edits)
    assert ran.returncode == 1
    assert "AssertionError" in ran.stderr or "TypeError" in ran.stderr


@pytest.mark.thorough
def test_a_new_option_is_refused_unless_it_has_its_default(copy_of_the_package):
    script = """
call = make_call(x, down, up)
assert call.gain == 1.0 and torch.is_tensor(raises(call))
changed = call._replace(gain=2.0)
assert all('feature "gain" is not implemented' in str(r) for r in refusals(changed))
assert call.key() != changed.key()
print("done")
"""
    option = r"^    dropout: float = 0.0  # .*$", "    dropout: float = 0.0\n    gain: float = 1.0"
    ran = copy_of_the_package(script, option)
    assert ran.stdout == "done\n", ran.stderr


def test_fields_are_tensors_then_options_and_gradients_follow_the_tensors():
    assert AdapterCall._fields == TENSOR_NAMES + OPTION_NAMES
    assert Needs._fields == Gradients._fields == TENSOR_NAMES
    call = make_call(*torch.ones(3, 2, 2), scaling=0.5)
    assert call.tensors() | call.options() == call._asdict()


def test_the_op_takes_the_fields_of_a_call_as_torch_itself_would_write_them():
    def prototype(*_):
        pass

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
        for name, hint in inspect.get_annotations(AdapterCall).items()
    ]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=None)
    fields = torch.library.infer_schema(prototype, mutates_args=()).removesuffix(") -> ()")[1:]
    assert fields == schema(AdapterCall)
    results = "Tensor y, Tensor normed, Tensor z, Tensor mean, Tensor rstd"
    expected = f"(str backend, bool save, {fields}) -> ({results})"
    assert str(torch.ops.adapterkern.forward.default._schema) == f"adapterkern::forward{expected}"
