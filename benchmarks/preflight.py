"""What a report starts with: build, parity check and GPU tests, each with its outcome."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


# The most of the time that is left which one step may take, so that the next ones have some.
SHARES = {"build": 0.6, "check": 0.6, "gpu_tests": 1.0}


def steps(quick: bool, build: bool) -> dict[str, list[str]]:
    """The commands by name, in their order; quick: a parity check of one size."""
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    check = ["-m", "adapterkern", "check", *(["--quick"] if quick else [])]
    tests = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    commands = {"build": pip, "check": check, "gpu_tests": tests}
    if not build:
        del commands["build"]
    return {name: [sys.executable, *command] for name, command in commands.items()}


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """How a command ended: status (passed, failed, no tests, out of time), seconds, last line."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return {"status": "out of time", "seconds": round(time.monotonic() - start, 1), "says": ""}
    says = (done.stdout.strip() or done.stderr.strip()).splitlines()
    no_tests = done.returncode == 5 and "pytest" in command
    status = "no tests" if no_tests else "passed" if done.returncode == 0 else "failed"
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "says": says[-1] if says else "",
    }
