"""The build: what setup.py understands, finds, compiles and records."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pybind11
import pytest
from building import (
    BUILD_VARIABLES,
    ROOT,
    build,
    built_extensions,
    recorded,
    run_build,
    script,
)
from setuptools import Distribution
from setuptools.errors import CompileError, SetupError

from adapterkern.backends.cuda import extension


def usable_nvcc() -> Path | None:
    try:
        return build.find_nvcc(os.environ)
    except build.NotBuilt:
        return None


needs_nvcc = pytest.mark.skipif(usable_nvcc() is None, reason="needs nvcc, and none was found")


def test_gencode_makes_machine_code_for_sm_and_ptx_for_compute():
    assert build.gencode("sm_90a") == "-gencode=arch=compute_90a,code=sm_90a"
    assert build.gencode("compute_90") == "-gencode=arch=compute_90,code=compute_90"


def test_read_settings_takes_defaults_for_unset_and_empty_variables():
    expected = build.Settings("auto", ("native",), None)
    assert build.read_settings({}) == expected
    assert build.read_settings(dict.fromkeys(BUILD_VARIABLES, "")) == expected


def test_read_settings_takes_every_variable():
    environ = dict(zip(BUILD_VARIABLES, ("1", "9.0", "3"), strict=True))
    assert build.read_settings(environ) == build.Settings("1", ("sm_90",), 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ADAPTERKERN_BUILD_CUDA", "yes"), ("MAX_JOBS", "0"), ("MAX_JOBS", "many")],
)
def test_read_settings_names_the_variable_and_the_bad_value(name, value):
    with pytest.raises(SetupError, match=f"{name} must be .*'{value}'"):
        build.read_settings({name: value})


def test_find_nvcc_prefers_cuda_home_then_cuda_path_then_path(tmp_path):
    places = {name: tmp_path / name for name in ("home", "path", "on_path")}
    for place in places.values():
        script(place / "bin" / "nvcc", "exit 0")
    environ = {
        "CUDA_HOME": str(places["home"]),
        "CUDA_PATH": str(places["path"]),
        "PATH": str(places["on_path"] / "bin"),
    }
    assert build.find_nvcc(environ) == places["home"] / "bin" / "nvcc"
    del environ["CUDA_HOME"]
    assert build.find_nvcc(environ) == places["path"] / "bin" / "nvcc"
    del environ["CUDA_PATH"]
    assert build.find_nvcc(environ) == places["on_path"] / "bin" / "nvcc"


def test_find_nvcc_passes_over_a_toolkit_folder_without_a_runnable_nvcc(tmp_path):
    on_path = script(tmp_path / "bin" / "nvcc", "exit 0")
    script(tmp_path / "home" / "bin" / "nvcc", "exit 0").chmod(0o644)
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(on_path.parent)}
    assert build.find_nvcc(environ) == on_path


def test_nvcc_candidates_end_with_the_toolkit_of_the_environment(tmp_path, monkeypatch):
    nvcc = script(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", "exit 0")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(build.nvcc_candidates({}))[-2:] == [Path("/usr/local/cuda/bin/nvcc"), nvcc]


def test_toolkit_root_of_a_wrapper_script_is_what_nvcc_itself_reports(tmp_path):
    wrapper = script(
        tmp_path / "bin" / "nvcc", 'echo "#$ _HERE_=/x" >&2; echo "#$ TOP=/opt/cuda/bin/.." >&2'
    )
    assert build.toolkit_root(wrapper) == Path("/opt/cuda")


def test_toolkit_root_refuses_a_program_that_is_not_nvcc(tmp_path):
    with pytest.raises(build.NotBuilt, match="is it nvcc"):
        build.toolkit_root(script(tmp_path / "nvcc", "echo hello"))


def test_run_ninja_obeys_max_jobs_and_keeps_the_log(tmp_path, monkeypatch):
    import ninja

    script(tmp_path / "bin" / "ninja", 'echo "called with $*"')
    monkeypatch.setattr(ninja, "BIN_DIR", str(tmp_path / "bin"))
    build.run_ninja(tmp_path, 3)
    log = tmp_path / "build.log"
    assert log.read_text() == f"called with -C {tmp_path} -j 3\n"
    build.run_ninja(tmp_path, None)
    assert log.read_text().splitlines()[1] == f"called with -C {tmp_path}"


def test_build_without_nvcc_records_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin" / "nvidia-smi", "echo 8.6").parent))
    monkeypatch.setattr(build, "nvcc_candidates", lambda environ: iter([Path("/nowhere/bin/nvcc")]))
    package = run_build(tmp_path, monkeypatch)
    assert built_extensions(package) == []
    record = recorded(package)
    assert record["REASON"].startswith("nvcc not found (looked in PATH, /nowhere/bin/nvcc;")
    assert (record["NVCC"], record["ARCHS"]) == (None, ())


def test_build_removes_the_extension_of_an_earlier_build(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "adapterkern"
    name = build.BuildCuda(Distribution()).get_ext_filename(build.EXTENSION)
    stale = tmp_path / "lib" / name
    package.mkdir(parents=True)
    stale.write_bytes(b"stale")
    run_build(tmp_path, monkeypatch, ADAPTERKERN_BUILD_CUDA="0")
    assert not stale.exists()
    assert recorded(package)["REASON"] == "ADAPTERKERN_BUILD_CUDA=0 when it was installed"


BROKEN_NVCC = """\
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --dryrun*) echo "#$ TOP=/opt/cuda" ;;
  *) echo "probe.cu(7): error: expected a ;" >&2; exit 2 ;;
esac"""


def test_build_demanded_with_a_broken_nvcc_fails_with_the_compilers_words(tmp_path, monkeypatch):
    script(tmp_path / "cuda" / "bin" / "nvcc", BROKEN_NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(CompileError, match=r"ADAPTERKERN_BUILD_CUDA=1, but .* expected a ;"):
        run_build(tmp_path, monkeypatch, ADAPTERKERN_BUILD_CUDA="1")


def test_build_with_a_broken_nvcc_goes_on_without_and_records_the_error(tmp_path, monkeypatch):
    script(tmp_path / "cuda" / "bin" / "nvcc", BROKEN_NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    package = run_build(tmp_path, monkeypatch, ADAPTERKERN_CUDA_ARCHS="80")
    assert built_extensions(package) == []
    reason = "compilation failed: probe.cu(7): error: expected a ;"
    assert recorded(package)["REASON"] == reason


def with_few_kernels(root: Path) -> Path:
    """Give `root` a csrc/ whose kernels have one of five widths of R and one of four dtypes.

    An install that builds the extension has compiled the others.
    """
    shutil.copytree(ROOT / "csrc", root / "csrc")
    switch = root / "csrc" / "static_switch.h"
    text, widths = re.subn(
        r"^ *if \(bottleneck_size <= (16|64|128|256)\) .*\n", "", switch.read_text(), flags=re.M
    )
    text, dtypes = re.subn(r"^ *case k(T?Float32|Float16):\n.*\n", "", text, flags=re.M)
    assert (widths, dtypes) == (4, 3)
    switch.write_text(text)
    return root


# A third of the work.
FOR_ONE_ARCH = {"ADAPTERKERN_BUILD_CUDA": "1", "ADAPTERKERN_CUDA_ARCHS": "sm_80"}


@pytest.fixture(scope="module")
def built_package(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(build, "ROOT", with_few_kernels(tmp_path_factory.mktemp("sources")))
        # As in pip's build environment, pybind11's headers are gone after the build.
        headers = shutil.copytree(
            pybind11.get_include(), tmp_path_factory.mktemp("pip") / "include"
        )
        with monkeypatch.context() as pip:
            pip.setattr(pybind11, "get_include", lambda: str(headers))
            package = run_build(tmp_path_factory.mktemp("build"), pip, **FOR_ONE_ARCH)
        shutil.rmtree(headers)
        yield package


@pytest.mark.thorough
@needs_nvcc
def test_second_build_finds_the_headers_of_pybind11_elsewhere_and_compiles_nothing(
    built_package, monkeypatch
):
    folder = built_package.parents[1]
    log = folder / "temp" / "build.log"
    size = len(log.read_text())
    run_build(folder, monkeypatch, **FOR_ONE_ARCH)
    assert log.read_text()[size:].splitlines()[1:] == ["ninja: no work to do."]


@pytest.mark.thorough
@needs_nvcc
def test_build_makes_an_extension_that_knows_what_it_was_built_for(built_package):
    (library,) = built_extensions(built_package)
    program = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("adapterkern._cuda", {str(library)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
count, name, text = module.device_count()
print(json.dumps([module.archs(), module.RUNTIME_VERSION, module.driver_version(), count, name]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archs, runtime, driver, count, error = json.loads(done.stdout)
    record = recorded(built_package)
    assert record["REASON"] is None
    assert tuple(archs) == record["ARCHS"] == ("sm_80",)
    assert record["NVCC"].startswith(f"{runtime // 1000}.{runtime % 1000 // 10}.")
    if driver == 0:
        assert (count, error) == (0, "cudaErrorInsufficientDriver")


@pytest.mark.thorough
@needs_nvcc
def test_build_exports_no_symbol_of_the_cuda_runtime(built_package):
    (library,) = built_extensions(built_package)
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert "PyInit__cuda" in names
    assert [name for name in names if re.match(r"_*cu(da)?[A-Z]", name)] == []


@pytest.mark.thorough
@needs_nvcc
def test_build_links_neither_torch_nor_a_shared_cuda_library(built_package):
    (library,) = built_extensions(built_package)
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic.stdout)
    assert needed
    assert [name for name in needed if re.search("torch|cud|nv|c10", name)] == []


def test_installed_extension_holds_machine_code_and_ptx_as_recorded():
    triton, library = map(importlib.util.find_spec, ("triton", "adapterkern._cuda"))
    if triton is None:
        pytest.skip("needs cuobjdump, which comes with triton")
    if library is None:
        pytest.skip("needs the extension")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run(
        [str(tool), "--list-elf", "--list-ptx", library.origin],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"probe\.(sm_\w+\.(?:cubin|ptx))", listing.stdout)
    kinds = {"sm": "cubin", "compute": "ptx"}
    archs = (arch.partition("_") for arch in extension.build_record().archs)
    assert sorted(found) == sorted(f"sm_{number}.{kinds[kind]}" for kind, _, number in archs)


@pytest.mark.thorough
@needs_nvcc
def test_build_log_keeps_the_resources_of_every_kernel(built_package):
    log = (built_package.parents[1] / "temp" / "build.log").read_text()
    kernel = r"Compiling entry function '\w*probe_kernel\w*' for '(\w+)'"
    assert re.findall(kernel, log) == ["sm_80"]
    assert "warning" not in log


def test_sdist_holds_the_sources_and_nothing_that_a_build_made(tmp_path):
    tree = tmp_path / "tree"
    made = shutil.ignore_patterns(
        ".git", ".*_cache", "build", "*.egg-info", "__pycache__", "results"
    )
    shutil.copytree(ROOT, tree, ignore=made)
    (tree / "adapterkern" / "_buildinfo.py").write_text("REASON = None\n")
    (tree / "adapterkern" / "_cuda.abi3.so").write_bytes(b"")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist")]
    subprocess.run(command, cwd=tree, capture_output=True, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert {"setup.py", "LICENSE", "adapterkern/__init__.py", *sources} <= names
    assert [name for name in names if "_buildinfo" in name or name.endswith((".so", ".pyc"))] == []


def test_tools_have_the_same_versions_for_pre_commit_and_for_ci():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    extras = (ROOT / "pyproject.toml").read_text()
    for tool in ("ruff", "clang-format"):
        pins = set(re.findall(rf"\b{tool}==[\w.]+", hooks))
        assert pins == set(re.findall(rf"\b{tool}==[\w.]+", extras))
        assert len(pins) == 1
