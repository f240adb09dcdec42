"""Imports `adapterkern._cuda` once and turns every mismatch into a sentence."""

import functools
import importlib
import sys
from types import ModuleType
from typing import NamedTuple

import torch

from adapterkern import _torch

REINSTALL = "pip install -v --no-deps -e . in a clone of adapterkern"


class BuildRecord(NamedTuple):
    """The record that setup.py wrote: `reason` is None if the extension was built."""

    reason: str | None
    nvcc: str | None
    archs: tuple[str, ...]


class Loaded(NamedTuple):
    """The extension, or the reason why there is none; exactly one of the two is None."""

    module: ModuleType | None
    problem: str | None


def build_record() -> BuildRecord:
    """The content of `adapterkern._buildinfo`, which a tree never installed does not have."""
    try:
        info = importlib.import_module("adapterkern._buildinfo")
    except ModuleNotFoundError:
        return BuildRecord("this source tree was never installed", None, ())
    return BuildRecord(info.REASON, info.NVCC, info.ARCHS)


@functools.cache
def load() -> Loaded:
    """Import the extension once and keep the answer."""
    record = build_record()
    try:
        return Loaded(importlib.import_module("adapterkern._cuda"), None)
    except ModuleNotFoundError:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        why = record.reason or f"it was built for another Python than this {python}"
        problem = f"the CUDA extension is not built: {why}.\n  hint: to build it, {REINSTALL}"
    except ImportError as error:
        problem = f"the CUDA extension does not load: {error}.\n  hint: build it anew, {REINSTALL}"
    return Loaded(None, problem)


def unavailable_reason() -> str | None:
    """Why no CUDA kernel can run in this process; None if one can."""
    module, problem = load()
    if module is None:
        return problem
    if not module.kernels():
        return "the CUDA extension holds no adapter kernels yet"
    return driver_problem(module.driver_version(), module.RUNTIME_VERSION) or device_problem()


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why this driver cannot run code built with this runtime; both are 1000 * major + 10 * minor.

    Any driver of the runtime's major version can (CUDA's minor version compatibility).
    """
    if driver == 0:
        return "no NVIDIA driver is installed (libcuda.so.1 is missing)"
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver supports CUDA up to {version_text(driver)}, the extension was "
            f"built with {version_text(runtime)}.\n  hint: update the driver, or build with a "
            f"toolkit of CUDA {driver // 1000}: CUDA_HOME=... {REINSTALL}"
        )
    return None


def device_problem() -> str | None:
    """Why torch offers no device to run on."""
    if torch.cuda.device_count() > 0:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA device is visible"


def version_text(version: int) -> str:
    """Write 13020 as "13.2"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def code_for(major: int, minor: int) -> str | None:
    """The compiled architecture that a driver takes for a device of this compute capability.

    Machine code serves its own major version, from its own minor version on; PTX serves every later
    device, through the driver's compiler; "a" and "f" code serves its own device alone.
    """
    device = 10 * major + minor
    serving = []
    for arch in build_record().archs:
        kind, _, name = arch.partition("_")
        number, specific = int(name.rstrip("af")), name[-1] in "af"
        serves = number == device if specific else kind != "sm" or number // 10 == major
        if serves and number <= device:
            serving.append((kind == "sm", number, specific, arch))
    return max(serving)[-1] if serving else None


def runs_clusters(major: int, minor: int) -> bool:
    """Whether a device of this compute capability runs the kernels with thread-block clusters.

    They need code for 9.0 or later. Compute capability 12.x has clusters too, but not the shared
    memory that makes them worth it.
    """
    code = code_for(major, minor)
    return major in (9, 10) and code is not None and int(code.partition("_")[2].rstrip("af")) >= 90


def runs_warpgroups(major: int, minor: int) -> bool:
    """Whether a device of this compute capability runs code for 9.0a, which alone has wgmma."""
    return code_for(major, minor) == "sm_90a"


@_torch.constant_under_compile  # it cannot trace an import
def code_problem(major: int, minor: int) -> str | None:
    """Why the loaded extension has no code that runs on a device of this compute capability.

    Machine code runs with any driver of the runtime's major version. A driver compiles PTX only if
    it is as new as the toolkit that wrote it, to the minor version.
    """
    code, module = code_for(major, minor), load().module
    if code is None:
        return (
            f"the CUDA extension has no code for compute capability {major}.{minor} (it has: "
            f"{', '.join(build_record().archs)}).\n  hint: build it with "
            f'ADAPTERKERN_CUDA_ARCHS="{major}.{minor}": {REINSTALL}'
        )
    if code.startswith("sm_") or module is None:
        return None
    driver, runtime = module.driver_version(), module.RUNTIME_VERSION
    if driver >= runtime:
        return None
    return (
        f"the CUDA extension has PTX alone for compute capability {major}.{minor}, which a driver "
        f"for CUDA {version_text(runtime)} or later compiles, and this one supports "
        f"{version_text(driver)}.\n  hint: update the driver, or build machine code: "
        f'ADAPTERKERN_CUDA_ARCHS="{major}.{minor}" {REINSTALL}'
    )


def code_on(device: torch.device) -> str:
    """The compiled architecture that the driver runs on `device`, found by the probe kernel.

    Returns:
        "sm_80" and the like for machine code, "compute_90" for PTX that the driver compiled.

    Raises:
        RuntimeError: the extension is missing, or holds no code for this device.
    """
    module, problem = load()
    if module is None:
        raise RuntimeError(problem)
    out = torch.zeros(2, dtype=torch.int32, device=device)
    module.probe(out.data_ptr(), out.device.index, torch.cuda.current_stream(device).cuda_stream)
    arch, specific = out.tolist()
    major, _ = torch.cuda.get_device_capability(device)
    return code_name(arch, bool(specific), major, module.archs())


def code_name(arch: int, specific: bool, major: int, archs: tuple[str, ...]) -> str:
    """The entry of `archs` that ran as `__CUDA_ARCH__` = `arch` on a device of this major version.

    PTX reports the architecture that it was written for, and machine code runs within its own major
    version only, which tells the two apart.
    """
    number = str(arch // 10) + ("a" if specific else "")
    machine_code = f"sm_{number}"
    if machine_code in archs and arch // 100 == major:
        return machine_code
    return f"compute_{number}"
