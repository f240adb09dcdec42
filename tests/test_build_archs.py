"""Which architectures an install builds for, what it says of it, and what it compiles again."""

import re
import shutil
from pathlib import Path

import pytest
from building import ROOT, build, built_extensions, recorded, run_build, script
from setuptools import Distribution
from setuptools.errors import CompileError, SetupError

from adapterkern import _env
from adapterkern.backends.cuda import extension

# Writes what it was asked to, and a line for each file that it compiles or links.
NVCC = """\
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V$(cat {folder}/version)"; exit ;;
  --list-gpu-code) printf "sm_75\\nsm_80\\nsm_90\\nsm_100\\nsm_120\\n"; exit ;;
  --dryrun*) echo "#$ TOP=/opt/cuda"; exit ;;
esac
echo "$*" >>{folder}/calls
echo "ptxas info    : Used 32 registers"
while [ "$1" != -o ]; do shift; done
echo made >"$2"
"""
ALL = ("sm_80", "sm_90a", "compute_90")


class Machine:
    """A folder with an nvcc and an nvidia-smi of its own, and three sources."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        script(folder / "cuda" / "bin" / "nvcc", NVCC.format(folder=folder))
        self.nvcc_version("13.0.88")
        self.sources = folder / "tree" / "csrc"
        self.sources.mkdir(parents=True)
        for name in ("bindings.cpp", "forward.cu", "backward.cu"):
            (self.sources / name).write_text("// a source")
        monkeypatch.setattr(build, "ROOT", folder / "tree")
        monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        # sh and env, for scripts, and no nvidia-smi of the real machine.
        (folder / "bin").mkdir()
        for tool in ("cat", "sleep"):
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        monkeypatch.setenv("PATH", str(folder / "bin"))

    def nvcc_version(self, version: str) -> None:
        (self.folder / "version").write_text(version)

    def nvidia_smi(self, body: str) -> None:
        script(self.folder / "bin" / "nvidia-smi", body)

    def gpus(self, *capabilities: str) -> None:
        self.nvidia_smi("\n".join(f"echo {capability}" for capability in capabilities))

    def build(self, **environ: str) -> dict:
        """The record of a build."""
        self.package = run_build(self.folder, self.monkeypatch, **environ)
        return recorded(self.package)

    def calls(self) -> list[str]:
        """The files that nvcc made since the last question."""
        log = self.folder / "calls"
        made = re.findall(r"-o (\S+)", log.read_text()) if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(re.sub(r"_cuda.*\.so", "_cuda.so", name) for name in made)


EVERYTHING = ["_cuda.so", "backward.cu.o", "bindings.cpp.o", "forward.cu.o"]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80", ("sm_80",)),
        ("8.0;9.0a", ("sm_80", "sm_90a")),
        ("sm_80, sm_90a,compute_90", ("sm_80", "sm_90a", "compute_90")),
        ("9.0+PTX", ("sm_90", "compute_90")),
        ("12.0 10.3a", ("sm_120", "sm_103a")),
        ("SM_90A 80 8.0", ("sm_90a", "sm_80")),
        ("Native;8.0", ("native", "sm_80")),
    ],
)
def test_parse_archs_reads_every_documented_spelling(text, archs):
    assert build.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["ninety", "sm_9x", "compute_90+PTX", "9.0.1", ";", "80-90"])
def test_parse_archs_refuses_what_it_cannot_read(text):
    with pytest.raises(SetupError, match="ADAPTERKERN_CUDA_ARCHS"):
        build.parse_archs(text)


def test_parse_archs_refuses_devices_without_bfloat16():
    with pytest.raises(SetupError, match=r"'7\.5' is below the lowest, sm_80"):
        build.parse_archs("8.0;7.5")


def test_all_archs_are_those_that_the_documentation_names():
    (entry,) = (v for v in _env.VARIABLES if v.name == "ADAPTERKERN_CUDA_ARCHS")
    (documented,) = set(re.findall(r"\b80;[\w;]+", f"{entry.default} {entry.meaning}"))
    assert build.parse_archs(documented) == build.parse_archs(build.ALL_ARCHS) == ALL


# -- visible GPUs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        (["8.6"], ("sm_80",)),
        (["9.0", "9.0"], ("sm_90a",)),
        (["12.0"], ("sm_120",)),
        (["10.3"], ("sm_100",)),  # the newest of 10.x that this nvcc knows
        (["11.0"], ("compute_90",)),  # it knows none
        (["9.0", "8.9", "8.0", "7.5"], ("sm_80", "sm_90a")),
        (["[N/A]", "8.0"], ("sm_80",)),
    ],
)
def test_build_is_for_the_visible_gpus_alone(machine, capabilities, archs):
    machine.gpus(*capabilities)
    assert machine.build()["ARCHS"] == archs
    assert len(built_extensions(machine.package)) == 1
    command = (machine.folder / "calls").read_text().splitlines()[0]
    assert set(re.findall(r",code=(\w+)", command)) == set(archs)


@pytest.mark.parametrize(
    "capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"]
)
def test_build_for_a_gpu_holds_code_that_runs_there(machine, monkeypatch, capability):
    """And the cluster kernels where all architectures would bring them."""
    major, minor = map(int, capability.split("."))
    machine.gpus(capability)
    archs = {"native": machine.build()["ARCHS"], "all": ALL}
    clusters = {}
    for name, built in archs.items():
        record = extension.BuildRecord(None, "13.0.88", built)
        monkeypatch.setattr(extension, "build_record", lambda record=record: record)
        assert extension.code_for(major, minor) in built
        clusters[name] = extension.runs_clusters(major, minor)
    assert clusters["native"] == clusters["all"] == (major in (9, 10))


CURE = (
    "; ADAPTERKERN_BUILD_CUDA=1 alone builds for sm_80, sm_90a and compute_90, "
    "about 4 minutes on 2 cores"
)


@pytest.mark.parametrize(
    ("smi", "why"),
    [
        (None, "nvidia-smi is not installed"),
        ("echo Failed to initialize NVML; exit 18", "Failed to initialize NVML"),
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("exec sleep 60", "nvidia-smi gave no answer in 0.2 s"),
    ],
    ids=["missing", "failing", "without devices", "hanging"],
)
def test_build_without_a_visible_gpu_compiles_nothing_and_says_why(machine, monkeypatch, smi, why):
    if smi:
        machine.nvidia_smi(smi)
    monkeypatch.setattr(build, "SMI_TIMEOUT_S", 0.2)
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    record = machine.build()
    said = f"no GPU was visible when adapterkern was installed ({why})"
    assert record == record | {"REASON": said + CURE, "NVCC": None, "ARCHS": ()}
    assert built_extensions(machine.package) == machine.calls() == []


def test_build_obeys_an_empty_list_of_visible_devices(machine, monkeypatch):
    machine.gpus("9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "(CUDA_VISIBLE_DEVICES hides them)" in machine.build()["REASON"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.build()["ARCHS"] == ("sm_90a",)


def test_build_for_a_gpu_that_is_too_old_names_its_capability(machine):
    machine.gpus("7.5", "7.0")
    reason = "its kernels need compute capability 8.0, and the GPU here has 7.0, 7.5"
    assert machine.build()["REASON"] == reason
    assert machine.calls() == []


def test_info_shows_the_reason_and_the_cure(machine, monkeypatch):
    reason = machine.build()["REASON"]

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extension, "build_record", lambda: extension.BuildRecord(reason, None, ()))
    monkeypatch.setattr(extension.importlib, "import_module", missing)
    shown = extension.load.__wrapped__().problem
    assert shown.startswith(f"the CUDA extension is not built: {reason}.\n  hint: ")


# -- what the environment asks for ----------------------------------------------------------------


def test_build_demanded_is_for_all_architectures_whatever_is_visible(machine):
    machine.gpus("8.6")
    assert machine.build(ADAPTERKERN_BUILD_CUDA="1")["ARCHS"] == ALL


def test_build_is_for_the_architectures_that_are_named_where_no_gpu_is(machine):
    assert machine.build(ADAPTERKERN_CUDA_ARCHS="90a")["ARCHS"] == ("sm_90a",)
    assert machine.build(ADAPTERKERN_CUDA_ARCHS="80", ADAPTERKERN_BUILD_CUDA="1")["ARCHS"] == (
        "sm_80",
    )


def test_build_takes_native_among_the_architectures(machine):
    machine.gpus("9.0")
    asked = {"ADAPTERKERN_CUDA_ARCHS": "80;native;90a;compute_90", "ADAPTERKERN_BUILD_CUDA": "1"}
    assert machine.build(**asked)["ARCHS"] == ALL


def test_build_demanded_for_a_gpu_that_is_not_there_fails(machine):
    with pytest.raises(CompileError, match="no GPU was visible"):
        machine.build(ADAPTERKERN_CUDA_ARCHS="native", ADAPTERKERN_BUILD_CUDA="1")


def test_build_switched_off_asks_neither_driver_nor_compiler(machine):
    machine.nvidia_smi(f"echo asked >{machine.folder}/calls")
    assert machine.build(ADAPTERKERN_BUILD_CUDA="0")["REASON"] == (
        "ADAPTERKERN_BUILD_CUDA=0 when it was installed"
    )
    assert not (machine.folder / "calls").exists()


# -- what is compiled again -----------------------------------------------------------------------


def test_second_build_compiles_what_has_changed_and_no_more(machine, monkeypatch):
    import pybind11

    machine.gpus("9.0")
    machine.build()
    assert machine.calls() == EVERYTHING

    # pip's build environment is another folder each time, with the same pybind11 in it.
    monkeypatch.setattr(pybind11, "get_include", lambda: "/tmp/another/include")
    shutil.rmtree(machine.package)  # as in a wheel's folder
    assert machine.build()["ARCHS"] == ("sm_90a",)
    assert machine.calls() == []
    assert [library.read_text() for library in built_extensions(machine.package)] == ["made\n"]

    (machine.sources / "forward.cu").write_text("// another")
    machine.build()
    assert machine.calls() == ["_cuda.so", "forward.cu.o"]

    monkeypatch.setattr(pybind11, "__version__", "99.1")
    machine.build()
    assert machine.calls() == ["_cuda.so", "bindings.cpp.o"]


def test_second_build_compiles_all_for_other_architectures_or_by_another_nvcc(machine):
    machine.gpus("9.0")
    machine.build()
    machine.calls()
    machine.nvcc_version("13.1.2")
    assert machine.build()["NVCC"] == "13.1.2"
    assert machine.calls() == EVERYTHING
    machine.gpus("8.0")
    machine.build()
    assert machine.calls() == EVERYTHING


@pytest.mark.parametrize("editable", [False, True])
def test_objects_stay_in_one_place_for_every_kind_of_install(tmp_path, editable):
    distribution = Distribution({"name": "adapterkern"})
    if editable:  # setuptools then builds in a folder that it deletes
        distribution.get_command_obj("build").build_temp = str(tmp_path)
    command = build.BuildCuda(distribution)
    command.editable_mode = command.inplace = editable
    command.ensure_finalized()
    assert Path(command.build_temp) == ROOT / "build" / "cuda"


# -- what is said ---------------------------------------------------------------------------------


def test_build_says_what_it_does_and_a_line_for_each_file(machine, monkeypatch, capsys):
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    machine.gpus("8.6")
    machine.build(MAX_JOBS="1")
    first, *lines, last = capsys.readouterr().err.splitlines()
    log = machine.folder / "temp" / "build.log"
    assert first == (
        "adapterkern: building the CUDA extension for sm_80, for the GPU here, of 8.6: "
        f"about 2 minutes on 2 cores if all is new, compilers' output in {log}; "
        "ADAPTERKERN_BUILD_CUDA=0 skips it"
    )
    shown = [re.fullmatch(r"\[(\d)/4, [\d.]+ s\] (\S+)", line).groups() for line in lines]
    assert [number for number, _ in shown] == ["1", "2", "3", "4"]
    assert sorted(re.sub(r"_cuda.*\.so", "_cuda.so", name) for _, name in shown) == EVERYTHING
    built = r"adapterkern: CUDA extension built by nvcc 13\.0\.88 for sm_80 in \d+ s"
    assert re.fullmatch(built, last)
    assert log.read_text().count("ptxas info") == 4


def test_build_says_that_the_environment_chose_the_architectures(machine, capsys):
    machine.build(ADAPTERKERN_BUILD_CUDA="1")
    said = "building the CUDA extension for sm_80 sm_90a compute_90, as the environment asks: "
    assert said in capsys.readouterr().err
