"""The import direction of the package, its public names, and the limits of its files."""

import ast
import graphlib
import inspect
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkern

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adapterkern"
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "_buildinfo.py"})  # that one is generated

# A room imports from rooms further up in this list, and within itself.
ROOMS = (
    "_env errors",
    "_torch",
    "activations validation results",
    "spec",
    "norm",
    "reference",
    "backends",
    "dispatch ops",  # one chooses a name, the other resolves it: neither knows the other
    "functional",
    "modules",
    "parity testing",
    "integrations bench",
    "cli",
    "__main__",
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms.split()}
# The files of grouped/ stand on the floors of their namesakes, or on these.
FLOORS = {"call": "spec", "routing": "ops"}
BEHIND_KERNELS = {
    "grouped.call",
    "backends.base", "backends.repeat", "backends.traffic",
    "spec", "results", "validation", "activations", "_torch", "_env",
}  # fmt: skip

# Third parties, and the only places that import them.
CONFINED = {
    "triton": ("backends/triton/", "cli/info/"),
    "adapterkern._cuda": ("backends/cuda/extension.py",),
    "transformers": ("integrations/", "cli/demo/"),
    "adapters": ("integrations/", "cli/demo/"),
    "peft": ("integrations/", "cli/demo/"),
}

FILE_LIMIT, FUNCTION_LIMIT = 400, 60


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def module_of(path):
    """backends/triton/forward.py -> backends.triton.forward; the package itself -> ''."""
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip(".")
    )


def room_of(module):
    room, _, file = module.partition(".")
    return FLOORS.get(file, file) if room == "grouped" and file else room


MODULES = {module_of(path) for path in SOURCES}


def imports_of(path):
    """Every module that a file names in an import, at any depth, absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inner = full.removeprefix("adapterkern.")
                yield full if inner in (*MODULES, "_cuda") else node.module


def own_imports_of(path):
    for name in imports_of(path):
        if name == "adapterkern" or name.startswith("adapterkern."):
            yield name.removeprefix("adapterkern").removeprefix(".")


def is_within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    module = module_of(path)
    room = room_of(module)
    if room in ("", "grouped"):
        return  # the package re-exports its public names
    for name in own_imports_of(path):
        other = room_of(name)
        if other == "":
            assert RANK[room] > RANK["modules"], f"{module} imports the package that it is part of"
        elif other != room:
            assert RANK[other] < RANK[room], f"{module} imports adapterkern.{name}"


def modules_named_by(path):
    """The modules of the package that a file imports, or names in a string for a later import."""
    strings = {
        node.value.partition(":")[0].removeprefix("adapterkern.")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith("adapterkern.")
    }
    registry = path == PACKAGE / "backends/__init__.py"  # the one that names who imports it
    return (strings & MODULES if not registry else set()) | (set(own_imports_of(path)) & MODULES)


def test_no_modules_import_each_other():
    graph = {module_of(path): modules_named_by(path) for path in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_room_is_known():
    assert {room_of(module) for module in MODULES} <= {*RANK, "", "grouped"}


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_kernel_backends_stand_alone(kernels):
    own = f"backends.{kernels}"
    for path in (PACKAGE / "backends" / kernels).rglob("*.py"):
        strange = {n for n in own_imports_of(path) if not is_within(n, own)} - BEHIND_KERNELS
        assert not strange, f"{name_of(path)} imports {strange}"


def test_the_registry_imports_no_backend():
    """It names them; they load at first use."""
    assert set(own_imports_of(PACKAGE / "backends/__init__.py")) == {"backends.base", "_torch"}
    assert set(own_imports_of(PACKAGE / "backends/base.py")) == {
        "grouped.call", "results", "spec", "validation",
    }  # fmt: skip


def test_testing_is_for_check_and_tests():
    importers = {name_of(p) for p in SOURCES if "testing" in set(own_imports_of(p))}
    assert all(re.match(r"cli/check(\.py|/)", name) for name in importers), importers


@pytest.mark.parametrize("package", CONFINED)
def test_third_parties_are_confined(package):
    for path in SOURCES:
        if any(is_within(name, package) for name in imports_of(path)):
            assert name_of(path).startswith(CONFINED[package]), f"{name_of(path)} imports {package}"


# Beside the door itself: what only torch's private names can measure.
PRIVATE_TORCH = ("_torch.py", "bench/timing.py", "bench/providers.py")


def private_names_of(path):
    """What a file names of torch that begins with an underscore, in code or in a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = " ".join(re.findall(r"torch\.[\w.]+", node.value))
        else:
            continue
        if re.match(r"(torch|nn|F|forward_ad|functional)\.", name) and re.search(
            r"\._[A-Za-z]", name
        ):
            yield name
    for name in imports_of(path):
        if is_within(name, "torch") and "._" in name:
            yield name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_of_torch_go_through_one_door(path):
    private = set(private_names_of(path))
    assert not private or name_of(path) in PRIVATE_TORCH


def test_the_door_is_known_by_what_goes_through_it():
    assert "torch._C" in set(private_names_of(PACKAGE / "_torch.py"))
    assert "torch._functorch.config" in set(private_names_of(PACKAGE / "bench/providers.py"))


def test_importing_the_package_loads_no_optional_part():
    """Only what every call needs: no backend, no model library, no compiler."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import adapterkern\n"
        "print(*(set(sys.modules) - before))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    loaded = ran.stdout.split()
    assert "adapterkern.functional" in loaded, ran.stderr
    own = [name for name in loaded if is_within(name, "adapterkern.backends")]
    assert set(own) == {"adapterkern.backends", "adapterkern.backends.base"}
    for part in (
        "adapterkern.integrations",
        "adapterkern.cli",
        "adapterkern._cuda",
        "torch._dynamo",
    ):
        assert not [name for name in loaded if is_within(name, part)]
    assert not {"adapters", "transformers", "peft", "matplotlib", "numpy.testing"} & set(loaded)


# How people call the package: a new argument comes last and has a default.
SIGNATURES = {
    "BottleneckAdapter": "(hidden_size, bottleneck_size=None, *, reduction_factor=None, "
    "activation='gelu', bias=True, scaling=1.0, dropout=0.0, init='identity', backend='auto', "
    "device=None, dtype=None)",
    "BottleneckAdapter.as_call": "(self, x, residual='input', skip=None)",
    "BottleneckAdapter.forward": "(self, x, residual='input', skip=None)",
    "BottleneckAdapter.reset_parameters": "(self)",
    "BottleneckAdapter.unfused_reason": "(self)",
    "Explanation": "(call, backend, reasons)",
    "ModelExplanation": "(rows, apart=())",
    "backends": "()",
    "bottleneck_adapter": "(x, down_weight, up_weight, down_bias=None, up_bias=None, *, "
    "residual='input', skip=None, activation='gelu', scaling=1.0, dropout=0.0, backend='auto')",
    "bottleneck_adapter_norm": "(x, down_weight, up_weight, norm_weight, down_bias=None, "
    "up_bias=None, norm_bias=None, *, residual='input', skip=None, activation='gelu', scaling=1.0, "
    "dropout=0.0, norm='layer', eps=1e-05, weight_offset=0.0, cast_before_weight=False, "
    "prenorm=False, backend='auto')",
    "AdapterNorm": "(adapter, norm)",
    "AdapterNorm.forward": "(self, x, residual='input', skip=None, *, prenorm=False)",
    "AdapterNorm.as_call": "(self, x, residual='input', skip=None, *, prenorm=False)",
    "AdapterBank": "(hidden_size, max_bottleneck_size=64, slots=16, *, activation='gelu', "
    "bias=True, residual='input', backend='auto', device=None, dtype=None)",
    "AdapterBank.add": "(self, name, adapter)",
    "AdapterBank.as_call": "(self, x, routing, skip=None, *, residual=None)",
    "AdapterBank.forward": "(self, x, routing, skip=None, *, residual=None)",
    "AdapterBank.ids": "(self, names)",
    "AdapterBank.remove": "(self, name)",
    "AdapterBanks": "(banks, route)",
    "AdapterBanks.add": "(self, name, adapters=None, **options)",
    "AdapterBanks.adapters": "(self, name)",
    "AdapterBanks.ids": "(self, names)",
    "AdapterBanks.load": "(self, name, file)",
    "AdapterBanks.remove": "(self, name)",
    "AdapterBanks.route": "(self, names)",
    "AdapterBanks.save": "(self, name, file)",
    "AdapterRouting": "(max_tokens, slots, *, device=None)",
    "AdapterRouting.update": "(self, ids, *, seq_len=None, cu_seqlens=None)",
    "grouped_bottleneck_adapter": "(x, down_weights, up_weights, routing, down_biases=None, "
    "up_biases=None, ranks=None, *, residual='input', skip=None, activation='gelu', scalings=None, "
    "backend='auto')",
    "explain": "(adapter, *args, **kwargs)",
    "insert": "(model, after, *, hidden_size=None, name='adapter', freeze=True, **options)",
    "insert_banks": "(model, after, *, hidden_size=None, name='bank', freeze=True, **options)",
    "use_backend": "(name)",
    "warmup": "(module, *args, **kwargs)",
}
ERRORS = {
    "BackendUnsupportedError": RuntimeError,
    "FallbackWarning": UserWarning,
    "UnsupportedAdapterError": RuntimeError,
}


def test_public_names_are_frozen():
    assert set(adapterkern.__all__) == {name.split(".")[0] for name in SIGNATURES} | set(ERRORS)
    assert re.fullmatch(r"\d+\.\d+\.\d+", adapterkern.__version__)
    for name, base in ERRORS.items():
        assert issubclass(getattr(adapterkern, name), base)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures_are_frozen(name):
    signature = inspect.signature(operator.attrgetter(name)(adapterkern))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def is_environ(node):
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "environ"
        and ast.unparse(node) == "os.environ"
    )


def test_environment_is_read_in_one_place():
    """To hand all of it on to a child process, `{**os.environ, ...}`, is not to read it."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        handed_on = {
            id(value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is None
        }
        reads = [n for n in ast.walk(tree) if is_environ(n) and id(n) not in handed_on]
        assert not reads or name_of(path) == "_env.py", f"{name_of(path)}:{reads[0].lineno}"
        assert "getenv" not in path.read_text(), name_of(path)


def body_length(function):
    """Lines of a function without signature and docstring."""
    first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
    return function.end_lineno - first.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= FILE_LIMIT
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = body_length(node)
            assert length <= FUNCTION_LIMIT, f"{name_of(path)}:{node.name} has {length} lines"


CSRC = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix != ".md")
# A file of csrc/ includes files further up in this list.
CSRC_ROOMS = (
    "params.h registry.h probe.h facts.h",
    "ptx.cuh launch.cuh",
    "static_switch.h activations.cuh memory.cuh",
    "tiles.cuh policy.cuh",
    "products.cuh forward_policy.cuh",
    "row_block.cuh cluster_tiles.cuh gradient_tiles.cuh resident_tiles.cuh",
    "norm.cuh",
    "cluster.cuh resident.cuh",
    "adapter_kernels.cuh",
    "forward.h backward.h grouped_forward.h norm_gradients.h weight_gradients.h",
    "forward.cu backward.cu grouped_forward.cu norm_gradients.cu weight_gradients.cu",
    "probe.cu facts.cu",
    "bindings.cpp",
)
# What the emulator must stand in for, and the only files that hold it.
CSRC_CONFINED = {
    r"\basm\b": {"ptx.cuh"},
    r"extern __shared__": {"ptx.cuh"},
    r"cudaLaunchKernel|cudaFuncSetAttribute": {"launch.cuh", "probe.cu"},  # which asks real devices
    r"<<<": set(),
    r"#include <(torch|ATen|c10)": set(),
    r"#include <pybind11": {"bindings.cpp"},
}


def test_csrc_includes_go_one_way():
    rank = {name: place for place, names in enumerate(CSRC_ROOMS) for name in names.split()}
    assert {path.name for path in CSRC} == rank.keys()
    for path in CSRC:
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            assert rank[name] < rank[path.name], f"{path.name} includes {name}"


@pytest.mark.parametrize("pattern", CSRC_CONFINED)
def test_csrc_keeps_what_the_emulator_replaces_in_its_place(pattern):
    code = {path.name: re.sub(r"//.*", "", path.read_text()) for path in CSRC}
    assert {name for name, text in code.items() if re.search(pattern, text)} == CSRC_CONFINED[
        pattern
    ]


def test_csrc_registers_every_kernel():
    text = "\n".join(path.read_text() for path in CSRC if path.suffix in (".cu", ".cuh"))
    kernels = re.findall(r"\b(bottleneck_\w+_kernel)\(const __grid_constant__", text)
    registered = re.findall(r'"(\w+)"', (ROOT / "csrc" / "registry.h").read_text())
    assert sorted(kernels) == sorted(registered)


def test_csrc_files_stay_readable():
    assert not [path.name for path in CSRC if len(path.read_text().splitlines()) > FILE_LIMIT]
