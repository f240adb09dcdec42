"""The house holds together: import direction, where third parties enter, the public names, sizes."""

import ast
import re
from pathlib import Path

import pytest

import adapterkern

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adapterkern"
CSRC = ROOT / "csrc"

# Room by room, the lower floors first; a module imports from its own room and from floors below.
FLOORS = (
    ("_env", "_buildinfo"),
    ("activations",),
    ("spec",),
    ("reference",),
    ("backends",),
    ("dispatch", "ops"),
    ("functional",),
    ("modules",),
    ("parity", "testing"),
    ("bench", "integrations"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py" and path.name != "_buildinfo.py"
}

# Where a third party may be imported: modules by prefix. torch and numpy may be anywhere.
ENTRANCES = {
    "triton": ("backends/triton", "testing", "bench", "cli/info"),
    "transformers": ("integrations", "cli/demo"),
    "peft": ("integrations", "cli/demo"),
    "adapters": ("integrations",),
    "safetensors": ("integrations", "cli/demo"),
    "matplotlib": ("bench", "cli/demo"),
}


def imports_of(path: Path) -> list[str]:
    """Dotted names of all that a module imports, at any depth of it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms of this package that a module imports from."""
    names = [name.split(".")[1:] for name in imports_of(path) if name.startswith("adapterkern.")]
    return {parts[0] for parts in names if parts and parts[0] in FLOOR}


def room(module: str) -> str:
    return module.split("/")[0]


def test_every_module_has_its_floor():
    assert {room(module) for module in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    own = room(module)
    wrong = {r for r in rooms_of(MODULES[module]) if r != own and FLOOR[r] >= FLOOR[own]}
    assert not wrong, f"{module} imports from {wrong}"


def test_import_check_sees_a_wrong_import(tmp_path):
    """The check can fail."""
    (tmp_path / "spec.py").write_text("from adapterkern.functional import bottleneck_adapter\n")
    assert rooms_of(tmp_path / "spec.py") == {"functional"}
    assert FLOOR["functional"] >= FLOOR["spec"]


@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_kernel_backends_know_only_the_contract(language):
    """Never the reference, never each other."""
    allowed = {"adapterkern.backends.base", "adapterkern.spec", "adapterkern.activations"}
    for module, path in MODULES.items():
        if not module.startswith(f"backends/{language}"):
            continue
        for name in imports_of(path):
            if name.startswith("adapterkern."):
                own = name.startswith(f"adapterkern.backends.{language}")
                below = name.rpartition(".")[0] in allowed or "_env" in name or "_build" in name
                below |= name.rpartition(".")[0] == "adapterkern._env"
                extension = name == "adapterkern._cuda" and module == "backends/cuda/extension"
                assert own or below or extension, f"{module} imports {name}"


@pytest.mark.parametrize("package", ENTRANCES)
def test_third_parties_enter_by_their_doors(package):
    for module, path in MODULES.items():
        if any(name.split(".")[0] == package for name in imports_of(path)):
            assert module.startswith(ENTRANCES[package]), f"{module} imports {package}"


def test_the_extension_is_imported_in_one_place():
    users = [module for module, path in MODULES.items() if "adapterkern._cuda" in imports_of(path)]
    assert set(users) <= {"backends/cuda/extension"}


def test_own_environment_variables_are_read_in_one_place():
    """By name; setup.py reads those of the build before the package exists."""
    pattern = re.compile(r"environ\S*\W+ADAPTERKERN_")
    users = [module for module, path in MODULES.items() if pattern.search(path.read_text())]
    assert set(users) <= {"_env"}


def test_public_names_are_these():
    assert sorted(adapterkern.__all__) == [
        "BackendUnsupportedError",
        "BottleneckAdapter",
        "Explanation",
        "backends",
        "bottleneck_adapter",
        "explain",
        "use_backend",
    ]
    for name in adapterkern.__all__:
        assert callable(getattr(adapterkern, name))


def test_cuda_sources_include_no_torch_header():
    for path in CSRC.iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_readable(module):
    source = MODULES[module].read_text()
    assert source.count("\n") <= 420
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            most = 110 if kernel else 80  # a kernel's signature is a table of its own
            assert node.end_lineno - node.lineno < most, node.name
