"""Probes of the installation: each returns one entry of the report, in types that JSON has.

torch and the rest of the package are imported inside the probes that need them, so that a broken
installation costs those probes alone.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement

import adapterkern
from adapterkern import _env

NETWORK_FILESYSTEMS = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
}
EXAMPLE_HIDDEN_SIZE = 768


def probe_versions() -> dict:
    """Installed versions, None where absent."""
    from adapterkern.bench import environment

    return environment.versions()


def probe_torch() -> dict:
    """The CUDA or ROCm version that torch was built for, and the triton that it requires."""
    import torch

    wanted = None
    for line in importlib.metadata.requires("torch") or []:
        requirement = Requirement(line)
        if requirement.name in ("triton", "pytorch-triton") and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            wanted = str(requirement.specifier)
    return {"cuda": torch.version.cuda, "rocm": torch.version.hip, "triton_wanted": wanted}


def probe_extension() -> dict:
    """The CUDA extension: architectures and kernels, or the reason for its absence."""
    from adapterkern.backends.cuda import extension

    module, problem = extension.load()
    if module is None:
        return {"built": False, "reason": problem}
    return {
        "built": True,
        "nvcc": extension.build_record().nvcc,
        "cuda": extension.version_text(module.RUNTIME_VERSION),
        "archs": list(module.archs()),
        "kernels": list(module.kernels()),
    }


def probe_driver() -> dict:
    """The NVIDIA driver's version, and the CUDA version that it supports; both None without one."""
    module_file = Path("/proc/driver/nvidia/version")
    text = module_file.read_text() if module_file.exists() else ""
    words = [word for word in text.split() if word.replace(".", "").isdigit() and "." in word]
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"version": words[0] if words else None, "cuda": None}
    version = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    supported = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None
    return {"version": words[0] if words else None, "cuda": supported}


def probe_gpus() -> dict:
    """The GPUs that torch sees, each with the extension's code that runs there."""
    import torch

    from adapterkern.backends.cuda import extension

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        if extension.load().module is not None:
            try:
                device["extension_code"] = extension.code_on(torch.device("cuda", index))
            except RuntimeError as error:
                device["extension_error"] = str(error)
        devices.append(device)
    return {"devices": devices}


def probe_compiler() -> dict:
    """The C compiler and Python.h, with which Triton compiles its launcher at the first launch."""
    # Triton's own order: the variable CC (read here to report it), then gcc, then clang.
    compiler = _env.of_another_tool("CC") or shutil.which("gcc") or shutil.which("clang")
    path = shutil.which(compiler) if compiler else None
    version = None
    if path:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
        version = done.stdout.partition("\n")[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    return {
        "compiler": compiler,
        "found": path is not None,
        "version": version,
        "python_h": str(header),
        "python_h_found": header.is_file(),
    }


def probe_cache() -> dict:
    """The folder in which Triton keeps compiled kernels, by its own order of variables."""
    home = _env.of_another_tool("TRITON_HOME") or str(Path.home())
    folder = Path(
        _env.of_another_tool("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")
    ).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    filesystem = filesystem_of(existing, Path("/proc/mounts"))
    return {
        "folder": str(folder),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "filesystem": filesystem,
        "network": filesystem in NETWORK_FILESYSTEMS,
    }


def probe_launches() -> dict:
    """Why launches of Triton kernels cost the host more than they need to, None if they do not."""
    if importlib.util.find_spec("triton") is None:
        return {"problem": None}
    from adapterkern.backends.triton import launcher

    return {"problem": launcher.PROBLEM}


def probe_tuned() -> dict:
    """The files of launch configurations in the order in which calls ask them, which of them serve
    a GPU that is here, and why others cannot be read.
    """
    import torch

    from adapterkern.backends.triton import tuned

    files, problems = tuned.read_all()
    devices = {tuned.device_of(index) for index in range(torch.cuda.device_count())}
    used = {path for device in devices for path in tuned.serving(files, device)}
    return {
        "folder": str(tuned.FOLDERS[0]),
        "files": [
            {"path": str(path), "gpu": f.gpu, "entries": len(f.entries), "used": path in used}
            for path, f in files.items()
        ],
        "problems": list(problems.values()),
    }


def filesystem_of(folder: Path, mounts: Path) -> str | None:
    """The type of the filesystem that holds `folder`, by a table like /proc/mounts."""
    if not mounts.exists():
        return None
    kind, depth = None, -1
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split(" ")
        mount = Path(point.replace("\\040", " "))
        # A later mount on the same point hides an earlier one.
        if folder.resolve().is_relative_to(mount) and len(mount.parts) >= depth:
            kind, depth = found, len(mount.parts)
    return kind


def probe_backends() -> dict:
    """Each backend: None if it can run in this process, else the reason why not."""
    return adapterkern.backends()


def probe_choice() -> dict:
    """The backend that a plain adapter would run on, per dtype, on the first GPU or the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = {"device": device}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        adapter = adapterkern.BottleneckAdapter(EXAMPLE_HIDDEN_SIZE, device=device, dtype=dtype)
        x = torch.zeros(1, EXAMPLE_HIDDEN_SIZE, device=device, dtype=dtype)
        choice[str(dtype).removeprefix("torch.")] = adapterkern.explain(adapter, x).backend
    return choice


def probe_environment() -> dict:
    """The package's environment variables that are set."""
    return _env.in_force()


PROBES: dict[str, Callable[[], dict]] = {
    "versions": probe_versions,
    "torch": probe_torch,
    "extension": probe_extension,
    "driver": probe_driver,
    "gpus": probe_gpus,
    "compiler": probe_compiler,
    "cache": probe_cache,
    "launches": probe_launches,
    "tuned": probe_tuned,
    "backends": probe_backends,
    "choice": probe_choice,
    "environment": probe_environment,
}
