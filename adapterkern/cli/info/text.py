"""The report as text for people, without colour or cursor movement."""

import textwrap
from collections.abc import Callable

WIDTH = 100
INDENT = 15


def render(report: dict) -> str:
    """The report as lines of text, without colour or cursor movement."""
    sections = []
    for title, name, text in SECTIONS:
        part = report[name]
        sections.append((title, ["not known, see problems"] if "error" in part else text(part)))
    sections.append(("problems", report["problems"] or ["none found"]))
    return "\n".join(
        _row(title if first == 0 else "", line)
        for title, lines in sections
        for first, line in enumerate(lines)
    )


def _row(title: str, text: str) -> str:
    """One line of the report under its title, wrapped; each newline in `text` starts a new line."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines += textwrap.wrap(
            paragraph.strip(),
            WIDTH,
            initial_indent=" " * INDENT if lines else f"{title:<{INDENT - 2}}",
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _versions_text(part: dict) -> list[str]:
    return ["   ".join(f"{name} {version}" for name, version in part.items() if version)]


def _torch_text(part: dict) -> list[str]:
    if part["cuda"]:
        return [f"for CUDA {part['cuda']}"]
    return [f"for ROCm {part['rocm']}" if part["rocm"] else "CPU-only build"]


def _extension_text(part: dict) -> list[str]:
    if not part["built"]:
        return [part["reason"]]
    kernels = ", ".join(part["kernels"]) or "no adapter kernels yet"
    return [f"built by nvcc {part['nvcc']} for {', '.join(part['archs'])}; holds {kernels}"]


def _driver_text(part: dict) -> list[str]:
    if not (part["version"] or part["cuda"]):
        return ["none found"]
    return [f"{part['version'] or 'version unknown'}, CUDA up to {part['cuda'] or 'unknown'}"]


def _gpus_text(part: dict) -> list[str]:
    lines = []
    for index, gpu in enumerate(part["devices"]):
        line = (
            f"cuda:{index} {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        )
        if "extension_code" in gpu:
            line += f", runs {gpu['extension_code']} of the extension"
        lines.append(line)
    return lines or ["none"]


def _compiler_text(part: dict) -> list[str]:
    compiler = part["version"] or f"{part['compiler'] or 'no C compiler'} not found"
    header = "found" if part["python_h_found"] else f"not found ({part['python_h']})"
    return [f"{compiler}; Python.h {header}"]


def _cache_text(part: dict) -> list[str]:
    state = "writable" if part["writable"] else "not writable"
    disk = "network" if part["network"] else "local"
    return [
        f"{part['folder']} ({state}, {disk} disk, {part['filesystem'] or 'unknown filesystem'})"
    ]


def _launches_text(part: dict) -> list[str]:
    return ["each in Triton's own way" if part["problem"] else "repeated with new addresses alone"]


def _tuned_text(part: dict) -> list[str]:
    lines = [
        f"{file['path']}: {file['entries']} entries from {file['gpu']}, "
        f"{'used here' if file['used'] else 'for other GPUs'}"
        for file in part["files"]
    ]
    return lines or [f"none; `adapterkern tune` writes to {part['folder']}"]


def _backends_text(part: dict) -> list[str]:
    return [f"{name}: {(reason or 'available').splitlines()[0]}" for name, reason in part.items()]


def _choice_text(part: dict) -> list[str]:
    choices = [f"{name} -> {backend}" for name, backend in part.items() if name != "device"]
    return [f"on {part['device']}: {', '.join(choices)}"]


def _environment_text(part: dict) -> list[str]:
    return [f"{name}={value}" for name, value in part.items()] or ["no variable set"]


SECTIONS: tuple[tuple[str, str, Callable[[dict], list[str]]], ...] = (
    ("versions", "versions", _versions_text),
    ("torch", "torch", _torch_text),
    ("extension", "extension", _extension_text),
    ("driver", "driver", _driver_text),
    ("gpus", "gpus", _gpus_text),
    ("C compiler", "compiler", _compiler_text),
    ("triton cache", "cache", _cache_text),
    ("launches", "launches", _launches_text),
    ("tuned", "tuned", _tuned_text),
    ("backends", "backends", _backends_text),
    ("would run", "choice", _choice_text),
    ("environment", "environment", _environment_text),
)
