"""The stages of a run: their steps in order, and the most seconds that each may take.

Correctness comes before speed, and the results on which most depends come first. Each step has a
hard limit, and the limits of a stage add up to less than its SECONDS, so that a stage ends by
itself whatever one step does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.gpu import workload
from benchmarks.gpu.measuring import Task
from benchmarks.gpu.output import JUNIT, TUNED

NAMES = ("verify", "report", "tune", "diagnose")
SECONDS = 520.0  # for a whole stage, in a lease of at most ten minutes a command
CLOSING_SECONDS = 5.0  # for the end of the processes and the summary
PROCESSES = 14  # of the machine's 16 cores; the parent and the driver have the others


@dataclass(frozen=True)
class Commands:
    """Processes side by side, by name, each a group of its own that ends with the step.

    Words of a command: "{python}" and "{out}" stand for this Python and the run's folder; gpu: a
    dry run skips the step; needs_build: it runs only if no extension came along.
    """

    name: str
    limit: float
    commands: dict[str, tuple[str, ...]]
    environment: dict[str, str] = field(default_factory=dict)
    gpu: bool = False
    needs_build: bool = False


@dataclass(frozen=True)
class Measure:
    """Tasks of the measuring worker, one after another."""

    name: str
    limit: float
    tasks: tuple[Task, ...]


Step = Commands | Measure


@dataclass(frozen=True)
class Wanted:
    """The subject of a diagnosis: parity cases, and the call that is profiled."""

    backend: str = "cuda"
    cases: tuple[str, ...] = ()
    kernel: str = "bottleneck_"
    tokens: int = 16384
    hidden_size: int = 1024
    bottleneck_size: int = 64
    mode: str = "step"


def steps(stage: str, wanted: Wanted | None = None, dry: bool = False) -> list[Step]:
    """Return the steps of a stage in their order.

    Raises:
        ValueError: an unknown stage.
    """
    if stage not in NAMES:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(NAMES)}.")
    found = {"verify": _verify, "report": _report, "tune": _tune}
    chosen = _diagnose(wanted or Wanted()) if stage == "diagnose" else found[stage]()
    return [_dry(step) for step in chosen] if dry else chosen


# -- verify: is it right, and the headline numbers ------------------------------------------------


def _verify() -> list[Step]:
    return [
        *_machine(40),
        Commands("parity cuda", 48, _shards("cuda", PROCESSES)),
        # The PTX wrappers compile a little program meanwhile.
        Commands(
            "parity triton",
            67,
            {
                **_shards("triton", PROCESSES),
                "wrappers": _pytest("tests/emulator/test_wrappers.py"),
            },
        ),
        Commands("gpu tests", 54, {"gpu tests": _gpu_tests()}),
        Measure("calibration", 25, (workload.CALIBRATE,)),
        Measure("adapters", 89, workload.VERIFIED),
        Measure("many adapters", 20, workload.VERIFIED_MANY),
        Measure("compiled", 68, (*workload.VERIFIED_COMPILED, workload.CALIBRATE_AGAIN)),
        Measure("blocks", 38, workload.BLOCKS),
        Commands("memcheck", 62, _sanitized("memcheck", workload.MEMCHECKED), UNCACHED, gpu=True),
    ]


# -- report: what it costs ------------------------------------------------------------------------


def _report() -> list[Step]:
    return [
        *_machine(30),
        # Most processes are for Triton's, which compiles.
        Commands("parity", 55, {**_shards("cuda", 3), **_shards("triton", PROCESSES - 3)}),
        Measure("calibration", 20, (workload.CALIBRATE,)),
        Measure("compiled", 97, workload.COMPARED),
        Measure("adapters", 128, workload.REPORTED + workload.SPECIAL + workload.NORMED),
        Measure("many adapters", 31, workload.MANY),
        Measure("models", 87, (workload.CALIBRATE_AGAIN, *workload.MODELS)),
        Measure("autotuned", 48, (workload.AUTOTUNED,)),
        Measure("host", 15, (Task("host", 12, {"do": "host"}),)),
    ]


# -- tune: how it should be launched --------------------------------------------------------------


def _tune() -> list[Step]:
    search = ("{python}", "-m", "adapterkern", "tune", "--minutes", "3.6")
    forms = workload.FORM_CASES
    few = 6 * PROCESSES  # every sixth case, about twenty of them
    half = PROCESSES // 2
    return [
        *_machine(30),
        Commands("parity", 30, {**_shards("cuda", few, half), **_shards("triton", few, half)}),
        Measure("calibration", 20, (workload.CALIBRATE,)),
        Commands("search", 245, {"search": (*search, "--out", f"{{out}}/{TUNED}")}, gpu=True),
        Commands("racecheck", 30, _sanitized("racecheck", forms), UNCACHED, gpu=True),
        Commands("synccheck", 30, _sanitized("synccheck", forms), UNCACHED, gpu=True),
        Measure("training", 62, workload.TRAINING),
        Commands(
            "adapterhub", 35, {"adapterhub": _pytest("tests/adapterhub", parallel=True)}, gpu=True
        ),
        # The timers on a real device; no speed is asserted.
        Commands("timers", 29, {"timers": _pytest("benchmarks/test_on_gpu.py")}, gpu=True),
    ]


# -- diagnose: why it is wrong, or slow -----------------------------------------------------------


def _diagnose(wanted: Wanted) -> list[Step]:
    shape = ("--tokens", str(wanted.tokens), "--hidden-size", str(wanted.hidden_size))
    shape = (*shape, "--bottleneck-size", str(wanted.bottleneck_size), "--mode", wanted.mode)
    once = ("{python}", "-m", "benchmarks.gpu.once", "--backend", wanted.backend, *shape)
    profile = (
        *("ncu", "--clock-control", "none", "--kernel-name", f"regex:{wanted.kernel}"),
        *("--launch-count", "12", *(f"--section={name}" for name in _SECTIONS)),
        *("--metrics", ",".join(_METRICS), "--print-summary", "per-kernel"),
    )
    patterns = wanted.cases or tuple(workload.FORMS.values())
    cases = [(wanted.backend, case) for case in patterns]
    return [
        *_machine(30),
        Commands("cases", 40, {"named cases": _check(wanted.backend, *patterns)}),
        *(
            Commands(tool, 75, _sanitized(tool, cases), UNCACHED, gpu=True)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Commands("profile", 125, {"profile": (*profile, *once)}, gpu=True),
    ]


# These tell what a slow kernel waits for, how often it misses L2, and how many bytes it moves.
_SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy")
_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio",
)

# -- commands -------------------------------------------------------------------------------------

# Every tensor is then an allocation of its own, beyond whose end an overrun is seen.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def _machine(limit: float) -> list[Commands]:
    """Record the machine (`run` adds the commit) and all that the driver says of the card; build
    the extension for this GPU alone if none came along that this Python can import.
    """
    facts = {"machine": ("{python}", "-m", "benchmarks.gpu.machine", "{identity}")}
    build = {"build": ("{python}", "setup.py", "build_ext", "--inplace")}
    settings = {"ADAPTERKERN_BUILD_CUDA": "1", "ADAPTERKERN_CUDA_ARCHS": "{arch}"}
    return [
        Commands("machine", limit, facts),
        Commands("card", 4, {"nvidia-smi": ("nvidia-smi", "-q")}, gpu=True),
        Commands("build", 150, build, settings, gpu=True, needs_build=True),
    ]


def _check(backend: str, *cases: str, shard: str = "") -> tuple[str, ...]:
    command = ("{python}", "-m", "adapterkern", "check", "--json", "--backend", backend)
    command += tuple(word for case in cases for word in ("--case", case))
    return (*command, "--shard", shard) if shard else command


def _shards(backend: str, count: int, most: int | None = None) -> dict[str, tuple[str, ...]]:
    return {
        f"{backend} {index}/{count}": _check(backend, shard=f"{index}/{count}")
        for index in range(1, (most or count) + 1)
    }


def _pytest(path: str, *words: str, parallel: bool = False) -> tuple[str, ...]:
    command = ("{python}", "-m", "pytest", path, "-m", "gpu", "-q", "-p", "no:cacheprovider")
    return (*command, *(("{parallel}",) if parallel else ()), *words)


def _gpu_tests() -> tuple[str, ...]:
    """Test all but parity, which ran before: graphs, streams, repeatability, offsets, autocast, and
    the routing of many adapters."""
    words = ("tests/test_gpu_many.py", "tests/test_cuda_extension.py", "-k", "not match_float64")
    return _pytest("tests/test_gpu.py", *words, f"--junitxml={{out}}/{JUNIT}", parallel=True)


def _sanitized(tool: str, cases: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    command += ("--kernel-name", "kns=bottleneck_")
    return {
        f"{tool} {backend} {case}": (*command, *_check(backend, case)) for backend, case in cases
    }


def _dry(step: Step) -> Step:
    """Return the same shape of work on the CPU, a few seconds long."""
    if isinstance(step, Measure):
        return Measure(step.name, step.limit, step.tasks[:2])
    commands = {
        name: _dry_check(index) if "check" in words and "--json" in words else words
        for index, (name, words) in enumerate(list(step.commands.items())[:2], 1)
    }
    return Commands(step.name, step.limit, commands, step.environment, step.gpu, step.needs_build)


def _dry_check(index: int) -> tuple[str, ...]:
    command = ("{python}", "-m", "adapterkern", "check", "--json", "--backend", "reference")
    return (*command, "--device", "cpu", "--quick", "--dtype", "fp32", "--shard", f"{index}/2")
