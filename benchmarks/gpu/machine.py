"""Describes the machine of a run, as lines for a reader and as one JSON object for the record."""

import argparse
import hashlib
import importlib
import json
import platform
import sys
from typing import Any

import torch

from adapterkern.backends import NAMES, get
from adapterkern.backends.cuda import extension
from adapterkern.bench import environment
from adapterkern.bench.results import SCHEMA
from benchmarks.tasks import fused_backends

CLUSTER_SIZES = (2, 4, 8, 16)
CLUSTER_KILOBYTES = (64, 112, 227)  # per block: an SM holds three, two, and one
CLUSTER_THREADS = 256


def main() -> int:
    """Print the lines to stderr and the record to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="leave a GPU alone")
    parser.add_argument("--commit", required=True, help="of the tree")
    parser.add_argument("--dirty", action="store_true", help="the tree differs from the commit")
    parser.add_argument("--stage", required=True, help="of the run")
    parser.add_argument("--command", required=True, help="of the run, as it was called")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not arguments.dry
    if not on_gpu and not arguments.dry:
        print("torch sees no CUDA device; --dry runs a stage on the CPU", file=sys.stderr)
        return 2
    found = facts(torch.device("cuda" if on_gpu else "cpu"), arguments.command)
    found |= {
        "schema": SCHEMA,
        "stage": arguments.stage,
        "commit": arguments.commit,
        "dirty": arguments.dirty,
    }
    for line in lines(found):
        print(line, file=sys.stderr)
    print(json.dumps({"header": found}))
    return 0


def facts(device: torch.device, command: str) -> dict[str, Any]:
    """Return the header of a run."""
    header = environment.header(device, command)
    header["python"] = platform.python_version()
    header["backends"] = fused_backends(device.type == "cuda")
    header["unavailable"] = {
        name: reason for name in NAMES if (reason := get(name).unavailable_reason()) is not None
    }
    header["extension"] = _extension(device)
    header["triton_key"] = triton_key()
    return header


def _extension(device: torch.device) -> dict[str, Any]:
    """Describe the file, its architectures, the one that runs here, and the clusters that fit."""
    module, problem = extension.load()
    if module is None:
        return {"problem": problem}
    found: dict[str, Any] = {
        "problem": None,
        "file": module.__file__,
        "archs": list(module.archs()),
        "nvcc": extension.build_record().nvcc,
    }
    if device.type == "cuda":
        try:
            found["runs"] = extension.code_on(device)
        except RuntimeError as error:  # no code for this device: Triton's kernels still run
            found["runs"] = f"nothing here ({error})"
        found["clusters"] = clusters_that_fit(module, torch.cuda.current_device())
    return found


def clusters_that_fit(module: Any, device: int) -> dict[str, dict[str, int | str]]:
    """{"8 blocks": {"227 KB": clusters at once}}; an error where the device has no such cluster."""
    found: dict[str, dict[str, int | str]] = {}
    for size in CLUSTER_SIZES:
        fitting = found.setdefault(f"{size} blocks", {})
        for kilobytes in CLUSTER_KILOBYTES:
            try:
                fits = module.clusters(device, size, CLUSTER_THREADS, kilobytes * 1024)
            except RuntimeError as error:
                fits = str(error)
            fitting[f"{kilobytes} KB"] = fits
    return found


def triton_key() -> str | None:
    """Return the first half of the hash of Triton's cached kernels, None without Triton."""
    for name in ("triton.runtime.cache", "triton.compiler.compiler"):
        try:
            key = importlib.import_module(name).triton_key()
        except (ImportError, AttributeError):
            continue
        return hashlib.sha256(key.encode()).hexdigest()[:32]
    return None


def lines(header: dict[str, Any]) -> list[str]:
    """Return the facts that a reader must know before any number."""
    versions, built = header["versions"], header["extension"]
    software = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    dirty = " with changes" if header["dirty"] else ""
    kernels = built["problem"] or (
        f"{built['file']}, {' '.join(built['archs'])}, nvcc {built['nvcc']}, "
        f"runs {built.get('runs', 'nothing here')}"
    )
    found = [
        f"stage {header['stage']}, commit {header['commit'][:12]}{dirty}",
        f"{header['device']}, driver {header.get('driver')}, CUDA {header['cuda']}, "
        f"{header.get('num_sms', 0)} SMs, clocks {header['clocks_before']}",
        software,
        f"extension: {kernels}",
        f"Triton key: {header['triton_key']}",
        f"backends: {', '.join(header['backends'])}",
    ]
    found += [f"without {name}: {reason}" for name, reason in header["unavailable"].items()]
    if "clusters" in built:
        found.append(f"clusters that fit: {json.dumps(built['clusters'])}")
    return found


if __name__ == "__main__":
    sys.exit(main())
