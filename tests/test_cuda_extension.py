"""The CUDA backend without kernels: every state of the extension is a sentence with its cure."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.backends.cuda import extension
from adapterkern.backends.cuda.backend import CudaBackend


@pytest.fixture
def imports(monkeypatch):
    """Set what `import_module` gives for the extension and its build record: module or error."""
    answers = {}
    real = importlib.import_module

    def import_module(name):
        answer = answers[name] if name in answers else real(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(extension.importlib, "import_module", import_module)
    extension.load.cache_clear()
    yield answers
    monkeypatch.undo()
    extension.load.cache_clear()


def module(kernels=("fwd",), driver=13000, runtime=13000):
    return SimpleNamespace(
        kernels=lambda: kernels, driver_version=lambda: driver, RUNTIME_VERSION=runtime
    )


def record(reason=None):
    return SimpleNamespace(REASON=reason, NVCC="13.0.88", ARCHS=("sm_80",))


def test_missing_extension_tells_the_recorded_reason_and_the_cure(imports):
    imports["adapterkern._cuda"] = ModuleNotFoundError("adapterkern._cuda")
    imports["adapterkern._buildinfo"] = record("nvcc not found")
    reason = extension.unavailable_reason()
    assert reason.startswith("the CUDA extension is not built: nvcc not found.")
    assert "pip install -v --no-deps -e . in a clone of adapterkern" in reason


def test_source_tree_without_a_build_record_says_so(imports):
    imports["adapterkern._cuda"] = ModuleNotFoundError("adapterkern._cuda")
    imports["adapterkern._buildinfo"] = ModuleNotFoundError("adapterkern._buildinfo")
    assert "this source tree was never installed" in extension.unavailable_reason()


def test_extension_for_another_python_is_recognised(imports):
    imports["adapterkern._cuda"] = ModuleNotFoundError("adapterkern._cuda")
    imports["adapterkern._buildinfo"] = record(reason=None)
    assert "built for another Python" in extension.unavailable_reason()


def test_extension_that_fails_to_load_passes_the_loaders_words_on(imports):
    imports["adapterkern._cuda"] = ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")
    imports["adapterkern._buildinfo"] = record()
    reason = extension.unavailable_reason()
    assert reason.startswith("the CUDA extension does not load: libstdc++.so.6: version")
    assert "build it anew" in reason


def test_extension_without_kernels_is_unavailable_whatever_the_machine(imports):
    imports["adapterkern._cuda"] = module(kernels=())
    imports["adapterkern._buildinfo"] = record()
    assert extension.unavailable_reason() == "the CUDA extension holds no adapter kernels yet"


def test_no_driver_and_no_device_are_told_apart(imports, monkeypatch):
    imports["adapterkern._cuda"] = module(driver=0)
    imports["adapterkern._buildinfo"] = record()
    assert "no NVIDIA driver is installed" in extension.unavailable_reason()
    extension.load.cache_clear()
    imports["adapterkern._cuda"] = module()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert extension.unavailable_reason() == "no CUDA device is visible"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extension.unavailable_reason() == f"torch {torch.__version__} is built without CUDA"


def test_driver_device_and_kernels_together_make_it_available(imports, monkeypatch):
    imports["adapterkern._cuda"] = module()
    imports["adapterkern._buildinfo"] = record()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert extension.unavailable_reason() is None


@pytest.mark.parametrize(
    ("driver", "runtime", "problem"),
    [
        (13000, 13000, None),
        (13000, 13020, None),  # minor version compatibility
        (13020, 12080, None),
        (
            12080,
            13000,
            "the NVIDIA driver supports CUDA up to 12.8, the extension was built with 13.0.",
        ),
        (0, 13000, "no NVIDIA driver is installed (libcuda.so.1 is missing)"),
    ],
)
def test_driver_problem_compares_major_versions(driver, runtime, problem):
    answer = extension.driver_problem(driver, runtime)
    assert (answer and answer.splitlines()[0]) == problem


ARCHS = ("sm_80", "sm_90a", "compute_90")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (ARCHS, (9, 0), True),
        (ARCHS, (10, 0), True),  # through PTX
        (ARCHS, (8, 0), False),
        (ARCHS, (12, 0), False),  # too little shared memory
        (("sm_80", "compute_80"), (9, 0), False),
        (("sm_80", "sm_100"), (9, 0), False),
        (("sm_90a", "compute_90a"), (10, 0), False),  # of 9.0 alone
        (("sm_90",), (10, 0), False),
        (("sm_100",), (10, 3), True),
        ((), (9, 0), False),
    ],
)
def test_clusters_need_a_device_and_code_for_them(monkeypatch, archs, capability, runs):
    record = extension.BuildRecord(None, "13.0", archs)
    monkeypatch.setattr(extension, "build_record", lambda: record)
    assert extension.runs_clusters(*capability) is runs


def test_compiled_code_asks_for_the_code_of_a_device():
    """torch.compile traces the choice of a backend, and cannot trace the import in here."""

    def asks(x):
        problems = extension.code_problem(9, 0), extension.code_problem(7, 5)
        return x + sum(problem is None for problem in problems)

    x = torch.zeros(3)
    assert torch.equal(torch.compile(asks, fullgraph=True, backend="eager")(x), asks(x))


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [
        (ARCHS, (8, 0), "sm_80"),
        (ARCHS, (8, 9), "sm_80"),
        (ARCHS, (9, 0), "sm_90a"),
        (ARCHS, (12, 0), "compute_90"),
        (("sm_80", "sm_86", "compute_80"), (8, 6), "sm_86"),
        (("sm_86", "compute_80"), (8, 0), "compute_80"),
        (("sm_90a",), (9, 0), "sm_90a"),
        (("sm_90a",), (10, 0), None),
        (("sm_80", "compute_80"), (9, 0), "compute_80"),
        ((), (8, 0), None),
    ],
)
def test_code_for_is_what_a_driver_takes(monkeypatch, archs, capability, code):
    record = extension.BuildRecord(None, "13.0", archs)
    monkeypatch.setattr(extension, "build_record", lambda: record)
    assert extension.code_for(*capability) == code
    if code is not None:  # which is what the probe finds there
        number = int(code.partition("_")[2].rstrip("a"))
        found = extension.code_name(10 * number, code.endswith("a"), capability[0], archs)
        assert found == code


@pytest.mark.parametrize(
    ("capability", "driver", "problem"),
    [
        ((9, 0), 13000, None),  # machine code
        ((12, 0), 13020, None),
        ((12, 0), 13000, "the CUDA extension has PTX alone for compute capability 12.0, which a "),
        ((7, 5), 13020, "the CUDA extension has no code for compute capability 7.5 (it has: sm_80"),
    ],
)
def test_ptx_needs_a_driver_as_new_as_its_toolkit(imports, capability, driver, problem):
    imports["adapterkern._cuda"] = module(driver=driver, runtime=13020)
    imports["adapterkern._buildinfo"] = SimpleNamespace(REASON=None, NVCC="13.2", ARCHS=ARCHS)
    found = extension.code_problem(*capability)
    assert (found is None) == (problem is None)
    if found is not None:
        assert found.startswith(problem)
        assert "ADAPTERKERN_CUDA_ARCHS" in found


@pytest.mark.parametrize(
    ("arch", "specific", "major", "archs", "name"),
    [
        (800, False, 8, ARCHS, "sm_80"),
        (900, True, 9, ARCHS, "sm_90a"),
        (900, False, 10, ARCHS, "compute_90"),
        (900, False, 9, ("sm_90", "compute_90"), "sm_90"),
        (900, False, 12, ("sm_90", "compute_90"), "compute_90"),
    ],
)
def test_code_name_tells_machine_code_from_ptx(arch, specific, major, archs, name):
    assert extension.code_name(arch, specific, major, archs) == name


def test_backend_declines_with_the_one_reason_and_refuses_to_run(imports):
    imports["adapterkern._cuda"] = module(kernels=())
    imports["adapterkern._buildinfo"] = record()
    backend = CudaBackend()
    assert backend.unavailable_reason() == "the CUDA extension holds no adapter kernels yet"
    assert backend.unsupported_reasons(spec=None) == [backend.unavailable_reason()]
    with pytest.raises(BackendUnsupportedError, match="holds no adapter kernels yet"):
        backend.forward(call=None, save=False)


def test_backend_declines_a_device_for_which_there_is_no_code(imports, monkeypatch):
    imports["adapterkern._cuda"] = module(driver=13000, runtime=13020)
    imports["adapterkern._buildinfo"] = SimpleNamespace(REASON=None, NVCC="13.2", ARCHS=ARCHS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    spec = SimpleNamespace(bottleneck_size=8, device=torch.device("cuda", 0))
    (reason,) = CudaBackend().limits(spec)
    assert "PTX alone for compute capability 12.0" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_probe_runs_the_code_made_for_this_device():
    if extension.load().module is None:
        pytest.skip(f"needs the extension: {extension.load().problem}")
    capability = torch.cuda.get_device_capability()
    if problem := extension.code_problem(*capability):
        pytest.skip(problem)
    expected = extension.code_for(*capability)
    assert expected in extension.load().module.archs()
    assert extension.code_on(torch.device("cuda", 0)) == expected
    assert importlib.import_module("adapterkern._cuda").device_count()[0] >= 1
