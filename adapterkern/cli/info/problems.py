"""Rules that find problems in the report; each sentence names the cure."""

import platform
from collections.abc import Callable

from packaging.requirements import Requirement
from packaging.version import Version

from adapterkern import _env

LOWEST = {"torch": "2.9.1", "triton": "3.5"}
LOWEST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


def find_problems(report: dict) -> list[str]:
    """Every problem of a report, the failed probes first."""
    problems = [
        f"probe {name}: {part['error']}" for name, part in report.items() if "error" in part
    ]
    for rule in RULES:
        try:
            problems += rule(report)
        except (KeyError, TypeError):  # it judges a probe that failed, which is listed already
            continue
    return problems


def version_problems(report: dict) -> list[str]:
    """Versions too old, and pairs known not to work together."""
    versions, torch = report["versions"], report["torch"]
    problems = [
        f"{name} {versions[name]} is older than {lowest}: pip install '{name}>={lowest}'"
        for name, lowest in LOWEST.items()
        if versions[name] and Version(versions[name]) < Version(lowest)
    ]
    triton, wanted = versions["triton"], torch["triton_wanted"]
    if triton is None:
        if platform.system() == "Linux":
            problems.append("triton is missing, so no fused kernel can run: pip install triton")
        return problems
    if wanted and not Requirement(f"triton{wanted}").specifier.contains(triton, prereleases=True):
        problems.append(
            f"torch {versions['torch']} is made for triton{wanted}, but {triton} is installed: "
            f"pip install 'triton{wanted}'"
        )
    numpy = versions["numpy"]
    if Version(triton).release[:2] == (3, 6) and numpy and Version(numpy) >= Version("2.4"):
        problems.append(
            f"triton {triton}'s interpreter fails with numpy {numpy}: pip install 'numpy<2.4' "
            "(kernels on a GPU are not affected)"
        )
    return problems


def driver_problems(report: dict) -> list[str]:
    """A driver that torch cannot use or does not see."""
    driver, torch, gpus = report["driver"], report["torch"], report["gpus"]["devices"]
    if gpus or not (driver["version"] or driver["cuda"]):
        return []
    if torch["cuda"] is None and torch["rocm"] is None:
        return [
            f"an NVIDIA driver is present, but torch {report['versions']['torch']} is a CPU-only "
            "build: install the CUDA build, see https://pytorch.org/get-started/locally"
        ]
    supported = driver["cuda"]
    if torch["cuda"] and supported and Version(supported).major < Version(torch["cuda"]).major:
        return [
            f"the NVIDIA driver supports CUDA up to {supported}, torch was built for "
            f"{torch['cuda']}: update the driver, or install a torch built for an older CUDA"
        ]
    return [
        "an NVIDIA driver is present, but torch sees no GPU: is CUDA_VISIBLE_DEVICES set empty?"
    ]


def gpu_problems(report: dict) -> list[str]:
    """GPUs that the kernels cannot run on."""
    problems = []
    for gpu in report["gpus"]["devices"]:
        if tuple(map(int, gpu["capability"].split("."))) < LOWEST_CAPABILITY:
            problems.append(
                f"{gpu['name']} has compute capability {gpu['capability']}; the fused kernels need "
                "8.0, so the PyTorch reference runs there"
            )
        elif "extension_error" in gpu:
            problems.append(
                f"the CUDA extension does not run on {gpu['name']}: {gpu['extension_error']}. "
                f"Build it anew with ADAPTERKERN_CUDA_ARCHS={gpu['capability']}"
            )
    return problems


def triton_problems(report: dict) -> list[str]:
    """Problems that would stop Triton's first launch; without a GPU there is none to stop."""
    if not report["gpus"]["devices"] or report["versions"]["triton"] is None:
        return []
    compiler, cache = report["compiler"], report["cache"]
    problems = []
    if not compiler["found"]:
        named = f"{compiler['compiler']} is not there" if compiler["compiler"] else "there is none"
        problems.append(f"Triton needs a C compiler and {named}: install gcc, or set CC")
    if not compiler["python_h_found"]:
        problems.append(
            f"Triton needs {compiler['python_h']}: install python3-dev (or python3-devel)"
        )
    if not cache["writable"]:
        problems.append(
            f"Triton cannot write {cache['folder']}: set TRITON_CACHE_DIR to a folder it can"
        )
    if cache["network"]:
        problems.append(
            f"Triton's cache {cache['folder']} is on a network disk ({cache['filesystem']}), where "
            "processes race: set TRITON_CACHE_DIR to a local folder"
        )
    return problems


def launch_problems(report: dict) -> list[str]:
    """A Triton whose launches cannot be repeated."""
    problem = report["launches"]["problem"]
    return [problem] if problem else []


def tuned_problems(report: dict) -> list[str]:
    """Files of launch configurations that no call uses, because they cannot be read."""
    problems = report["tuned"]["problems"]
    return [f"tuned launch configurations left out: {problem}" for problem in problems]


def backend_problems(report: dict) -> list[str]:
    """A backend named by the environment that cannot run a plain adapter here."""
    choice, name = report["choice"], report["environment"].get("ADAPTERKERN_BACKEND")
    failing = [dtype for dtype, chosen in choice.items() if chosen.startswith("none")]
    if name is None or not failing:
        return []
    reason = report["backends"][name.strip().lower()] or "adapterkern.explain tells why"
    return [
        f"ADAPTERKERN_BACKEND={name} makes every call raise on {choice['device']} in "
        f"{', '.join(failing)} ({reason}): unset it, or name another backend"
    ]


def variable_problems(_report: dict) -> list[str]:
    """Variables that the package does not have, which are probably misspelled."""
    return _env.unknown_variables()


RULES: tuple[Callable[[dict], list[str]], ...] = (
    version_problems,
    driver_problems,
    gpu_problems,
    triton_problems,
    launch_problems,
    tuned_problems,
    backend_problems,
    variable_problems,
)
