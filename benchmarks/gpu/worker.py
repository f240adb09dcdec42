"""The measuring worker: tasks as JSON lines on its input, records as JSON lines on its output.

Whatever else prints goes to stderr, and so into the log. A lost device ends the process, because
nothing in it can use the device again.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> int:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, sizes of a few units")
    arguments = parser.parse_args()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(kind: str, **content: Any) -> None:
        channel.write(json.dumps({"reply": kind, **content}) + "\n")
        channel.flush()

    from benchmarks import tasks

    bench = tasks.Bench.here(tiny=arguments.dry)
    reply("ready")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _fault(request.pop("fault", ""))
            serve(tasks, bench, request, reply)
        except tasks.LostDeviceError as error:
            reply("lost", note=_sentence(error))
            return 1
    return 0


def serve(tasks: Any, bench: Any, request: dict[str, Any], reply: Callable[..., None]) -> None:
    """Run one task and answer; a failure is the task's own."""
    try:
        for kind, content in tasks.run(bench, request):
            reply("record", content={"kind": kind, **content})
        reply("done", status="done", note="")
    except tasks.LostDeviceError:
        raise
    except Exception as error:
        lost = tasks.lost_device(bench.device)
        if lost is not None:
            raise tasks.LostDeviceError(f"{_sentence(error)}; {lost}") from error
        reply("done", status="failed", note=_sentence(error))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _fault(kind: str) -> None:
    """Cause a fault that a run must survive, if a dry run requests it."""
    if kind == "hang":
        time.sleep(3600)
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "lose":
        from adapterkern.bench.results import LostDeviceError

        raise LostDeviceError("the device was lost, on request")


if __name__ == "__main__":
    sys.exit(main())
