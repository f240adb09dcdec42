"""The header of a result: where, on what and by which versions it was measured."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from adapterkern import __version__, _env
from adapterkern.backends.triton import tuned
from adapterkern.bench import driver

# The packages on which numbers and results depend.
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "peft", "adapters"),
    "nvmath-python",
)
ROOT = Path(__file__).parents[2]  # the source tree's, where there is one
SOURCES = ("adapterkern", "csrc", "benchmarks", "setup.py", "pyproject.toml")
_GPU_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def header(device: torch.device, command: str) -> dict[str, Any]:
    """Return all that identifies a run; `clocks_after` and the calibration are added later."""
    commit, dirty = git_state(ROOT)
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_model(),
        **_gpu_facts(device),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "variables": _env.in_force(),
        "clocks_before": clocks(device),
        "calibration": {},
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name as its driver gives it; "cpu" and its kind without one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def cpu_model() -> str | None:
    """Return the processor's name as Linux gives it, None where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def folder_name(device: str) -> str:
    """Return a device's name as a folder: nvidia-h200."""
    words = "".join(letter if letter.isalnum() else " " for letter in device.lower()).split()
    return "-".join(words)


def versions() -> dict[str, str | None]:
    """Return installed versions, None if absent; a package that fails to import still shows."""
    found: dict[str, str | None] = {
        "adapterkern": __version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return (commit, whether the sources differ from it), Nones outside a git work tree."""
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if commit is None:
        return None, None
    # Results are written while the tree is measured and change nothing about it.
    scope = ["--", *SOURCES, ":(exclude)benchmarks/results"]
    return commit, bool(_output(["git", "-C", str(root), "status", "--porcelain", *scope]))


def clocks(device: torch.device) -> dict[str, float] | None:
    """Read clocks in MHz, power in W and temperature in degrees Celsius from nvidia-smi."""
    if device.type != "cuda":
        return None
    values = _query_gpu(device, ",".join(_GPU_FIELDS.values()))
    if values is None or len(values) != len(_GPU_FIELDS):
        return None
    numbers = {}
    for name, value in zip(_GPU_FIELDS, values, strict=True):
        try:
            numbers[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return numbers


def peak_bandwidth(device: torch.device) -> float | None:
    """Return the bytes per second that a GPU's memory can transfer, at two bits a clock and data
    line; None where its driver does not tell, and on a CPU.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        clock = driver.device_attribute(index, driver.MEMORY_CLOCK_RATE)
        width = driver.device_attribute(index, driver.MEMORY_BUS_WIDTH)
    except (OSError, RuntimeError):
        return None
    return 2 * clock * 1e3 * width / 8 or None  # some virtual GPUs hide the clock: 0


def command_line(name: str) -> str:
    """Return how the running command was called, under its public name."""
    return " ".join([name, *sys.argv[1:]])


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    properties: Any = torch.cuda.get_device_properties(device)
    version = _query_gpu(device, "driver_version")
    files, _ = tuned.read_all()
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "peak_bandwidth": peak_bandwidth(device),
        "driver": version[0] if version else None,
        "tuned": [str(path) for path in tuned.serving(files, tuned.device_of(device))],
    }


def _query_gpu(device: torch.device, fields: str) -> list[str] | None:
    # The UUID is used because CUDA_VISIBLE_DEVICES renumbers the devices, but not nvidia-smi's.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    text = _output(["nvidia-smi", *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    return None if text is None else [value.strip() for value in text.split(",")]


def _output(command: list[str]) -> str | None:
    """Return what a command prints, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
