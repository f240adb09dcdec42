"""Builds adapterkern: pure Python, and the extension `adapterkern._cuda` if nvcc is found.

The extension is optional and free of torch: ninja runs nvcc over `csrc/`, and the CUDA runtime is
linked in statically, so one build serves every torch version. An install without it works, and
`adapterkern info` shows the reason, which each build keeps in adapterkern/_buildinfo.py.

Environment:
    ADAPTERKERN_BUILD_CUDA  auto (default): build for the GPUs that are visible, and nothing where
                            none is; 1: build for all architectures, and fail the install if the
                            extension cannot be built; 0: do not build it
    ADAPTERKERN_CUDA_ARCHS  architectures to build for instead (see `parse_archs`)
    CUDA_HOME, CUDA_PATH    toolkit folders, searched before PATH (see `nvcc_candidates`)
    MAX_JOBS                compiler processes at a time
    NVCC_CCBIN              nvcc's own variable for its host compiler
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
EXTENSION = "adapterkern._cuda"

# Machine code for 8.x (sm_80 runs on 8.6 and 8.9 too) and for 9.0 with its own instructions; on
# every newer GPU the driver compiles the PTX at first use.
ALL_ARCHS = "sm_80;sm_90a;compute_90"
LOWEST_ARCH = 80  # bfloat16 tensor cores and cp.async
# What a core of today and nvcc 13.0 take for all sources: 400 s for these three, 250 s for one of
# them; forward.cu alone is two fifths of it, whatever the number of cores.
SECONDS, SECONDS_AN_ARCH, LONGEST_FILE = 150, 90, 0.4
SMI_TIMEOUT_S = 20

# No fast-math flag: it changes division, denormals and erf. One thread per nvcc: ninja already runs
# one nvcc per source, and threads times jobs is what exhausts memory.
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xfatbin=-compress-all",  # a quarter of the size
    "--threads=1",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas=-v",  # registers, stack and shared memory of each kernel, for the build log
)
# Nothing of the static CUDA runtime may leak out: torch brings a runtime of its own.
LINK_FLAGS = ("-shared", "--no-device-link", "-cudart=static", "-Xlinker=--exclude-libs,ALL")


class NotBuilt(Exception):
    """Why there is no CUDA extension; an error only under ADAPTERKERN_BUILD_CUDA=1."""


@dataclass(frozen=True)
class Settings:
    """The settings that the environment asks for."""

    mode: str  # auto | 1 | 0
    archs: tuple[str, ...]  # "native" stands for those of the visible GPUs
    max_jobs: int | None


@dataclass(frozen=True)
class BuildInfo:
    """The content of adapterkern/_buildinfo.py."""

    reason: str | None = None  # why the extension is missing; None: it was built
    nvcc: str | None = None  # version
    archs: tuple[str, ...] = ()

    def source(self) -> str:
        """The generated module."""
        return (
            '"""How this installation was built; written by setup.py."""\n\n'
            f"REASON = {self.reason!r}\nNVCC = {self.nvcc!r}\nARCHS = {self.archs!r}\n"
        )


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read and check the build's environment variables.

    Raises:
        SetupError: a value is not allowed, whatever ADAPTERKERN_BUILD_CUDA says.
    """
    mode = environ.get("ADAPTERKERN_BUILD_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "1", "0"):
        raise SetupError(f'ADAPTERKERN_BUILD_CUDA must be "auto", "1" or "0", got {mode!r}.')
    jobs = environ.get("MAX_JOBS", "").strip()
    if jobs and not re.fullmatch(r"[1-9]\d*", jobs):
        raise SetupError(f"MAX_JOBS must be a positive integer, got {jobs!r}.")
    archs = environ.get("ADAPTERKERN_CUDA_ARCHS", "").strip()
    archs = archs or (ALL_ARCHS if mode == "1" else "native")
    return Settings(mode, parse_archs(archs), int(jobs) if jobs else None)


def parse_archs(text: str) -> tuple[str, ...]:
    """Architectures in nvcc's names, in the given order, without repeats.

    Entries are separated by ";", "," or spaces. "sm_90a", "90a" and "9.0a" ask for machine code,
    "compute_90" for PTX, and "9.0+PTX" for both, as in TORCH_CUDA_ARCH_LIST. "native" stays.

    Raises:
        SetupError: an entry has another form, or is below compute capability 8.0.
    """
    archs: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        if entry.lower() == "native":
            archs.append("native")
            continue
        match = re.fullmatch(
            r"(sm_|compute_)?(\d{1,2}\.\d|\d{2,3})([af]?)(\+PTX)?", entry, re.IGNORECASE
        )
        if match is None or (match[1] and match[4]):
            raise SetupError(
                f"ADAPTERKERN_CUDA_ARCHS: cannot read {entry!r}.\n"
                f'  hint: write for instance "{ALL_ARCHS}", "8.0;9.0a;9.0+PTX" or "native".'
            )
        number = match[2].replace(".", "")
        if int(number) < LOWEST_ARCH:
            raise SetupError(
                f"ADAPTERKERN_CUDA_ARCHS: {entry!r} is below the lowest, sm_{LOWEST_ARCH}."
            )
        name = number + match[3].lower()
        archs.append((match[1] or "sm_").lower() + name)
        if match[4]:
            archs.append(f"compute_{name}")
    if not archs:
        raise SetupError("ADAPTERKERN_CUDA_ARCHS names no architecture.")
    return tuple(dict.fromkeys(archs))


def driver_says(environ: Mapping[str, str]) -> str:
    """What nvidia-smi prints of the GPUs' compute capabilities, or why it prints nothing.

    It is asked because pip's build environment has no torch. A driver that fails or hangs counts as
    no GPU: it must not keep anyone from installing.
    """
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them"
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        )
        return process.communicate(timeout=SMI_TIMEOUT_S)[0]
    except OSError:
        return "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a hanging driver may not let go of it
        return f"nvidia-smi gave no answer in {SMI_TIMEOUT_S} s"


def visible_gpus(environ: Mapping[str, str]) -> list[int]:
    """Compute capabilities, as 86 for 8.6, of the GPUs here that can run the kernels.

    Raises:
        NotBuilt: there is none; the message tells why, and how to build all the same.
    """
    says = driver_says(environ)
    found = {int(a + b) for a, b in re.findall(r"^(\d+)\.(\d)$", says, re.MULTILINE)}
    if not found:
        archs = parse_archs(ALL_ARCHS)
        raise NotBuilt(
            f"no GPU was visible when adapterkern was installed ({' '.join(says.split())}); "
            f"ADAPTERKERN_BUILD_CUDA=1 alone builds for {', '.join(archs[:-1])} and {archs[-1]}, "
            f"{duration(archs)}"
        )
    usable = sorted(gpu for gpu in found if gpu >= LOWEST_ARCH)
    if not usable:
        raise NotBuilt(
            f"its kernels need compute capability 8.0, and the GPU here has {dotted(found)}"
        )
    return usable


def dotted(gpus: Iterable[int]) -> str:
    """Write [86, 90] as "8.6, 9.0"."""
    return ", ".join(f"{gpu // 10}.{gpu % 10}" for gpu in sorted(gpus))


def duration(archs: tuple[str, ...]) -> str:
    """How long a build of all sources takes here."""
    cores = os.cpu_count() or 1
    seconds = (SECONDS + SECONDS_AN_ARCH * len(archs)) * max(1 / cores, LONGEST_FILE)
    minutes = math.ceil(seconds / 60)
    return f"about {minutes} minute{'s' * (minutes > 1)} on {cores} core{'s' * (cores > 1)}"


def arch_of(gpu: int, nvcc: Path) -> str:
    """The code for one GPU: sm_80 serves all of 8.x, sm_90a serves 9.0; newer ones get the newest
    machine code of their major version that nvcc knows, or the PTX that they get by default.
    """
    if gpu < 100:
        return "sm_90a" if gpu >= 90 else "sm_80"
    known = map(int, re.findall(r"^sm_(\d+)$", _output([nvcc, "--list-gpu-code"]), re.MULTILINE))
    serving = [number for number in known if gpu // 10 * 10 <= number <= gpu]
    return f"sm_{max(serving)}" if serving else "compute_90"


def gencode(arch: str) -> str:
    """nvcc's option for one entry of `parse_archs`."""
    return f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}"


def nvcc_candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    """The places where nvcc may be, in the order of the search."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield Path(environ[variable], "bin", "nvcc").absolute()
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        yield Path(on_path).absolute()
    yield Path("/usr/local/cuda/bin/nvcc")
    # The environment that is installed into may have the nvidia-cuda-nvcc package.
    yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"), reverse=True)


def find_nvcc(environ: Mapping[str, str]) -> Path:
    """The first candidate that can be run.

    Raises:
        NotBuilt: there is none; the message tells where it was looked for.
    """
    candidates = list(nvcc_candidates(environ))
    for nvcc in candidates:
        if nvcc.is_file() and os.access(nvcc, os.X_OK):
            return nvcc
    places = ", ".join(["PATH", *dict.fromkeys(map(str, candidates))])
    raise NotBuilt(
        f"nvcc not found (looked in {places}; set CUDA_HOME to the folder of a CUDA toolkit)"
    )


def nvcc_version(nvcc: Path) -> str:
    """The compiler's version, such as "13.0.88"."""
    match = re.search(r"release .*V([\d.]+)", _output([nvcc, "--version"]))
    if match is None:
        raise NotBuilt(f"{nvcc} --version does not name a release; is it nvcc?")
    return match[1]


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc sees it: the file itself may be a wrapper script elsewhere."""
    match = re.search(
        r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE
    )
    if match is None:
        raise NotBuilt(f"{nvcc} --dryrun does not name its toolkit folder; is it nvcc?")
    return Path(match[1].strip()).resolve()


def _output(command: list) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise NotBuilt(f"{command[0]} does not run: {error}") from error
    return done.stdout


def ninja_file(sources: list[Path], library: Path, nvcc: Path, info: BuildInfo) -> str:
    """The text of the build; nvcc compiles every source, as it knows its headers and libraries.

    ninja compiles anew what another command or other headers made. So the versions of the tools are
    in the commands, and pip's build environment, a new folder each time, is not (see `run_ninja`).
    """
    try:
        import pybind11
    except ImportError as error:
        raise NotBuilt("pybind11, which its build needs, is not installed") from error
    # Kernels see neither Python nor pybind11.
    bindings = [
        f"-isystem={sysconfig.get_path('include')}",
        f"-DADAPTERKERN_PYBIND11={pybind11.__version__}",
        f'-DADAPTERKERN_ARCHS="{" ".join(info.archs)}"',
    ]
    code = [gencode(arch) for arch in info.archs]
    # Toolkits from PyPI keep their libraries in lib, where their nvcc does not look.
    libraries = f"-L{toolkit_root(nvcc) / 'lib'}"
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {_command(nvcc, *NVCC_FLAGS, *code)} $extra -MMD -MF $out.d -c $in -o $out"
        f" # {info.nvcc}",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_command(nvcc, *LINK_FLAGS, *code, libraries)} -o $out $in",
        "  description = $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.name}.o")
        path = re.sub(r"([$ :])", r"$\1", str(source))
        lines.append(f"build {objects[-1]}: compile {path}")
        if source.suffix == ".cpp":
            lines.append(f"  extra = {_command(*bindings)}")
    lines += [f"build {library.name}: link {' '.join(objects)}", f"default {library.name}", ""]
    return "\n".join(lines)


def _command(*words: Path | str) -> str:
    """Quote words for a shell, within a ninja file."""
    return shlex.join(map(str, words)).replace("$", "$$")


def run_ninja(folder: Path, max_jobs: int | None) -> None:
    """Build in `folder`: a line for each file as it is done, everything else into build.log.

    Raises:
        NotBuilt: a command failed; the message carries the first error.
    """
    import pybind11

    try:
        from ninja import BIN_DIR

        ninja = str(Path(BIN_DIR) / "ninja")
    except ImportError:
        ninja = shutil.which("ninja") or "ninja"
    command = [ninja, "-C", str(folder), *(["-j", str(max_jobs)] if max_jobs else [])]
    environ = {**os.environ, "NINJA_STATUS": "[%f/%t, %e s] "}
    include = os.environ.get("CPLUS_INCLUDE_PATH")
    environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, [pybind11.get_include(), include]))
    line, errors = "no output", []
    try:
        with (
            (folder / "build.log").open("a") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
            ) as process,
        ):
            for line in process.stdout:
                log.write(line)
                wrong = re.search(r"\b(error|fatal)\b", line)
                errors += [line.strip()] if wrong else []
                if wrong or line.startswith("[") or "warning" in line:
                    print(line, end="", file=sys.stderr, flush=True)
    except OSError as error:
        raise NotBuilt(f"ninja does not run: {error}") from error
    if process.returncode:
        raise NotBuilt(f"compilation failed: {(errors or [line.strip()])[0]}")


def say(text: str) -> None:
    """Print a line, which `pip install -v` shows as it comes."""
    print(f"adapterkern: {text}", file=sys.stderr, flush=True)


class BuildCuda(build_ext):
    """build_ext that builds the CUDA extension, or records why it did not."""

    def finalize_options(self) -> None:
        # A place that stays, for `pip install .` and `-e .` alike, so that ninja finds the objects
        # of the build before; setuptools' own is a new folder for each editable install.
        self.build_temp = self.build_temp or str(ROOT / "build" / "cuda")
        super().finalize_options()

    def run(self) -> None:
        settings = read_settings(os.environ)
        library, start = None, time.monotonic()
        try:
            library, info = self.compile(settings)
            say(
                f"CUDA extension built by nvcc {info.nvcc} for {' '.join(info.archs)} in "
                f"{time.monotonic() - start:.0f} s"
            )
        except NotBuilt as error:
            if settings.mode == "1":
                raise CompileError(
                    f"ADAPTERKERN_BUILD_CUDA=1, but the CUDA extension was not built: {error}"
                ) from error
            info = BuildInfo(reason=str(error))
            say(f"CUDA extension not built: {error}")
        for folder in [Path(self.build_lib), *([ROOT] if self.inplace else [])]:
            self.place(folder, library, info)

    def compile(self, settings: Settings) -> tuple[Path, BuildInfo]:
        """Build the library in the build folder; return it, and what it was built with."""
        if settings.mode == "0":
            raise NotBuilt("ADAPTERKERN_BUILD_CUDA=0 when it was installed")
        if not sys.platform.startswith("linux"):
            raise NotBuilt(f"it is built on Linux only, and this is {sys.platform}")
        gpus = visible_gpus(os.environ) if "native" in settings.archs else []
        nvcc = find_nvcc(os.environ)
        native = [arch_of(gpu, nvcc) for gpu in gpus]
        archs = chain(*(native if arch == "native" else [arch] for arch in settings.archs))
        info = BuildInfo(nvcc=nvcc_version(nvcc), archs=tuple(dict.fromkeys(archs)))
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / Path(self.get_ext_filename(EXTENSION)).name
        sources = sorted(
            path for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")
        )
        (folder / "build.ninja").write_text(ninja_file(sources, library, nvcc, info))
        why = f"for the GPU here, of {dotted(gpus)}" if gpus else "as the environment asks"
        say(
            f"building the CUDA extension for {' '.join(info.archs)}, {why}: "
            f"{duration(info.archs)} if all is new, compilers' output in {folder / 'build.log'}; "
            "ADAPTERKERN_BUILD_CUDA=0 skips it"
        )
        run_ninja(folder, settings.max_jobs)
        return library, info

    def place(self, folder: Path, library: Path | None, info: BuildInfo) -> None:
        """Put the results into the package under `folder`, replacing those of an earlier build."""
        extension, buildinfo = self.outputs_in(folder)
        buildinfo.parent.mkdir(parents=True, exist_ok=True)
        buildinfo.write_text(info.source())
        extension.unlink(missing_ok=True)
        if library is not None:
            shutil.copy2(library, extension)

    def outputs_in(self, folder: Path) -> tuple[Path, Path]:
        return folder / self.get_ext_filename(EXTENSION), folder / "adapterkern" / "_buildinfo.py"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.outputs_in(Path(self.build_lib)) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Build outputs, and the files in the source tree that replace them when editable."""
        if not self.inplace:
            return {}
        pairs = zip(self.outputs_in(Path(self.build_lib)), self.outputs_in(ROOT), strict=True)
        return {str(built): str(placed) for built, placed in pairs if built.exists()}


if __name__ == "__main__":
    # Without a declared extension, setuptools would not run build_ext.
    setup(
        ext_modules=[Extension(EXTENSION, sources=[], optional=True)],
        cmdclass={"build_ext": BuildCuda},
    )
