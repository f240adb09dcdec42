"""The report as text for people, without colour or cursor movement, in 80 columns."""

import textwrap
from collections.abc import Callable

WIDTH = 80
INDENT = 14
KEPT = "\u00a0"  # between words that stay on one line; it is printed as a space


def render(report: dict) -> str:
    """The report as lines of text: what a user needs first, the details behind."""
    lines = [_wrapped(report["summary"])]
    if report["problems"]:
        lines += ["", "What is amiss:"]
        lines += [_wrapped(problem, first="- ", others="  ") for problem in report["problems"]]
    else:
        lines.append("Nothing is amiss.")
    lines.append("")
    for title, name, text in SECTIONS:
        part = report[name]
        found = ["not known, see above"] if "error" in part else text(part, report)
        for index, line in enumerate(found):
            first = f"{'' if index else title:<{INDENT}}"
            lines.append(_wrapped(line, first, " " * INDENT))
    return "\n".join(lines)


def _wrapped(text: str, first: str = "", others: str = "") -> str:
    """Text within WIDTH; each newline in it starts a new line."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        lines += textwrap.wrap(
            paragraph.strip(),
            WIDTH,
            initial_indent=others if lines else first,
            subsequent_indent=others,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines).replace(KEPT, " ")


def _versions_text(part: dict, _report: dict) -> list[str]:
    return [", ".join(f"{name}{KEPT}{version}" for name, version in part.items() if version)]


def _torch_text(part: dict, _report: dict) -> list[str]:
    if part["cuda"]:
        return [f"built for CUDA {part['cuda']}"]
    return [f"built for ROCm {part['rocm']}" if part["rocm"] else "built for the CPU alone"]


def _extension_text(part: dict, _report: dict) -> list[str]:
    if not part["built"]:
        return [part["reason"]]
    kernels = f"{len(part['kernels'])} kernels" if part["kernels"] else "no adapter kernels yet"
    return [f"built for {', '.join(part['archs'])} by nvcc {part['nvcc']}; {kernels}"]


def _driver_text(part: dict, _report: dict) -> list[str]:
    if not (part["version"] or part["cuda"]):
        return ["no NVIDIA driver found"]
    return [f"{part['version'] or 'version unknown'}, CUDA up to {part['cuda'] or 'unknown'}"]


def _gpus_text(part: dict, _report: dict) -> list[str]:
    lines = []
    for index, gpu in enumerate(part["devices"]):
        line = (
            f"cuda:{index} {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        )
        if "extension_code" in gpu:
            line += f", runs {gpu['extension_code']} of the extension"
        lines.append(line)
    return lines or ["none"]


def _compiler_text(part: dict, _report: dict) -> list[str]:
    compiler = part["version"] or f"{part['compiler'] or 'no C compiler'} not found"
    header = "found" if part["python_h_found"] else f"not found ({part['python_h']})"
    return [f"{compiler}; Python.h {header}"]


def _cache_text(part: dict, _report: dict) -> list[str]:
    state = "writable" if part["writable"] else "not writable"
    disk = "network" if part["network"] else "local"
    return [
        f"{part['folder']} ({state}, {disk} disk, {part['filesystem'] or 'unknown filesystem'})"
    ]


def _launches_text(part: dict, _report: dict) -> list[str]:
    return [
        "each in Triton's own way, which costs the host more"
        if part["problem"]
        else "repeated calls reuse recorded launches, which costs the host less"
    ]


def _tuned_text(part: dict, _report: dict) -> list[str]:
    lines = [
        f"{file['path']}: {file['entries']} entries from {file['gpu']}, "
        f"{'used here' if file['used'] else 'for other GPUs'}"
        for file in part["files"]
    ]
    return lines or [f"none; `adapterkern tune` writes to {part['folder']}"]


def _backends_text(part: dict, report: dict) -> list[str]:
    """The reason is one line; that of a missing extension stands in full under its own title."""
    told_below = report["extension"].get("reason")
    return [
        f"{name}: {'see CUDA build' if reason and reason == told_below else _first_line(reason)}"
        for name, reason in part.items()
    ]


def _first_line(reason: str | None) -> str:
    return (reason or "can run").splitlines()[0]


def _choice_text(part: dict, _report: dict) -> list[str]:
    choices = [f"{name} -> {backend}" for name, backend in part.items() if name != "device"]
    return [f"on {part['device']}: {', '.join(choices)}".replace(" -> ", f"{KEPT}->{KEPT}")]


def _environment_text(part: dict, _report: dict) -> list[str]:
    return [f"{name}={value}" for name, value in part.items()] or ["no variable set"]


SECTIONS: tuple[tuple[str, str, Callable[[dict, dict], list[str]]], ...] = (
    ("versions", "versions", _versions_text),
    ("torch", "torch", _torch_text),
    ("would run", "choice", _choice_text),
    ("backends", "backends", _backends_text),
    ("GPUs", "gpus", _gpus_text),
    ("driver", "driver", _driver_text),
    ("CUDA build", "extension", _extension_text),
    ("C compiler", "compiler", _compiler_text),
    ("Triton cache", "cache", _cache_text),
    ("launches", "launches", _launches_text),
    ("tuned", "tuned", _tuned_text),
    ("environment", "environment", _environment_text),
)
