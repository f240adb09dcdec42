"""What a report starts with: build, parity check and GPU tests, each with its outcome."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


# The most that a step may take: of all the time left, or of the time for checks that is left.
BUILD_SHARE = 0.5
SHARES = {"check": 0.6, "gpu_tests": 1.0}


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
    # A session of its own, so that what the command started ends with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    says = (out.strip() or err.strip()).splitlines()
    no_tests = process.returncode == 5 and "pytest" in command
    status = "no tests" if no_tests else "passed" if process.returncode == 0 else "failed"
    return {
        "status": "out of time" if late else status,
        "seconds": round(time.monotonic() - start, 1),
        "says": says[-1] if says else "",
    }
