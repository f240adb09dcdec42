"""Reports of `adapterkern info` from machines that are not here."""

import copy

# A machine with one H100 on which nothing is amiss.
HEALTHY = {
    "versions": {
        "adapterkern": "0.1.0",
        "python": "3.11.7",
        "torch": "2.9.1",
        "triton": "3.5.1",
        "numpy": "2.4.1",
        "transformers": None,
        "peft": None,
        "adapters": None,
    },
    "torch": {"cuda": "13.0", "rocm": None, "triton_wanted": "==3.5.1"},
    "extension": {
        "built": True,
        "nvcc": "13.0.88",
        "cuda": "13.0",
        "archs": ["sm_80", "sm_90a", "compute_90"],
        "kernels": [],
    },
    "driver": {"version": "580.65.06", "cuda": "13.0"},
    "gpus": {
        "devices": [
            {
                "name": "NVIDIA H100",
                "capability": "9.0",
                "memory_gib": 79.2,
                "extension_code": "sm_90a",
            }
        ]
    },
    "compiler": {
        "compiler": "/usr/bin/gcc",
        "found": True,
        "version": "gcc 12.2.0",
        "python_h": "/usr/include/python3.11/Python.h",
        "python_h_found": True,
    },
    "cache": {
        "folder": "/home/me/.triton/cache",
        "writable": True,
        "filesystem": "ext4",
        "network": False,
    },
    "launches": {"problem": None},
    "tuned": {
        "folder": "/home/me/.cache/adapterkern/tuned",
        "files": [
            {"path": "/home/me/h100.json", "used": True, "gpu": "NVIDIA H100", "entries": 25},
            {"path": "/package/a100.json", "used": False, "gpu": "NVIDIA A100", "entries": 7},
        ],
        "problems": [],
    },
    "backends": {"cuda": None, "triton": None, "reference": None},
    "choice": {"device": "cuda", "float32": "cuda", "float16": "cuda", "bfloat16": "cuda"},
    "environment": {},
}


def machine(**changes: dict) -> dict:
    """Return HEALTHY with some entries of some sections replaced."""
    report = copy.deepcopy(HEALTHY)
    for section, values in changes.items():
        report[section] |= values
    return report


def gpu(**changes) -> dict:
    return {"devices": [HEALTHY["gpus"]["devices"][0] | changes]}
