"""Every environment variable of the package, typed, read here only and once, at import.

Reading once keeps the hot path free of lookups and lets torch.compile treat each value as a
constant. Values are taken as they are: `dispatch.check_environment` knows the backends and
refuses what is none of a variable's values, at the first call and in every command. It also warns
of the names in UNKNOWN, which are misspelled or belong to another version.
`docs/environment.md` is generated from VARIABLES (`python adapterkern/_env.py`).
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    name: str
    values: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "ADAPTERKERN_BACKEND",
        "auto | NAME",
        "auto",
        "Backend of every call that does not name one; `adapterkern info` lists the names. A named "
        "backend raises when it cannot run the call; only `auto` falls back.",
    ),
    Variable(
        "ADAPTERKERN_STRICT",
        "0 | 1",
        "0",
        "1: a call on a GPU that would fall back to the reference raises instead.",
    ),
    Variable(
        "ADAPTERKERN_PUBLIC_TORCH",
        "0 | 1",
        "0",
        "1: use none of torch's private functions, for a release of torch that has changed one. "
        "The answers are the same; each call costs the host more, torch.compile gets plain "
        "operations instead of the kernels (and an error where a kernel backend is named), and "
        "hooks on all modules are not seen.",
    ),
    Variable(
        "ADAPTERKERN_CUDA_RESIDENT",
        "0 | 1",
        "0",
        "1: on compute capability 9.0 the cuda backend may take its resident form, which keeps "
        "rows on chip and multiplies by wgmma. No GPU has run it yet: compare it with "
        "`adapterkern check`.",
    ),
    Variable(
        "ADAPTERKERN_BUILD_CUDA",
        "auto | 1 | 0",
        "auto",
        "Install time. auto: build the CUDA extension for the GPUs that are visible, and leave it "
        "out where none is (`adapterkern info` tells why); 1: build it for all architectures, and "
        "fail the install if it cannot be built; 0: leave it out.",
    ),
    Variable(
        "ADAPTERKERN_CUDA_ARCHS",
        "native | e.g. 80;90a",
        "native",
        "Install time. GPU architectures to compile the CUDA extension for, whether such a GPU is "
        "here or not; native: those of the visible GPUs. With ADAPTERKERN_BUILD_CUDA=1 the default "
        "is 80;90a;compute_90.",
    ),
    Variable(
        "TRITON_INTERPRET",
        "0 | 1",
        "0",
        "Triton's own switch, read when kernels are defined. With 1 (and only then) the triton "
        "backend accepts CPU tensors, slowly; its bfloat16 is then mended for all kernels of the "
        "process.",
    ),
    Variable(
        "XDG_CACHE_HOME",
        "an absolute path",
        "~/.cache",
        "Folder of all programs' caches. `adapterkern tune` writes to `adapterkern/tuned` in it, "
        "which the triton backend reads before the package's own launch configurations.",
    ),
)


def _value(name: str, default: str) -> str:
    return os.environ.get(name, default).strip().lower() or default


PREFIX = "ADAPTERKERN_"
UNKNOWN = tuple(
    name
    for name in os.environ
    if name.upper().startswith(PREFIX) and name not in {v.name for v in VARIABLES}
)
BACKEND = _value("ADAPTERKERN_BACKEND", "auto")
STRICT = _value("ADAPTERKERN_STRICT", "0")
PUBLIC_TORCH = _value("ADAPTERKERN_PUBLIC_TORCH", "0")
CUDA_RESIDENT = _value("ADAPTERKERN_CUDA_RESIDENT", "0")
_caches = os.environ.get("XDG_CACHE_HOME", "")
# The specification of the variable says that a relative path is to be ignored.
CACHE = Path(_caches if os.path.isabs(_caches) else os.path.expanduser("~/.cache"), "adapterkern")
# Triton accepts more spellings than we document; any of its true values counts.
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
    "y",
)


def unknown_variables() -> list[str]:
    """A sentence on each variable in UNKNOWN, with the name that was probably meant."""
    import difflib  # only where there is such a variable: an import of the package stays quick

    known = [v.name.removeprefix(PREFIX) for v in VARIABLES if v.name.startswith(PREFIX)]
    sentences = []
    for name in UNKNOWN:
        # Without the prefix, which would make all names alike.
        near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), known, n=1)
        if near:
            hint = f"; did you mean {PREFIX}{near[0]}?"
        else:
            hint = f" and has no effect; it has {', '.join(PREFIX + one for one in known)}"
        sentences.append(f"{name} is no variable of adapterkern{hint}")
    return sentences


def in_force() -> dict[str, str]:
    """The documented variables that are set in this process, name to value."""
    return {v.name: os.environ[v.name] for v in VARIABLES if v.name in os.environ}


def of_another_tool(name: str) -> str | None:
    """A variable that another tool reads (CC, TRITON_CACHE_DIR), as it is now; None if unset."""
    return os.environ.get(name) or None


def markdown() -> str:
    """The text of docs/environment.md."""
    rows = [
        f"| `{v.name}` | `{v.values.replace('|', chr(92) + '|')}` | `{v.default}` | {v.meaning} |"
        for v in VARIABLES
    ]
    head = [
        "# Environment variables",
        "",
        "Generated by `python adapterkern/_env.py`; each is read once, when the package is "
        "imported or installed.",
        "",
        f"A variable whose name begins with `{PREFIX}` and is none of these has no effect. Since "
        "it is probably misspelled, a warning tells so, with the nearest of these names: in the "
        "log `adapterkern` at the first call of an adapter, and in every command.",
        "",
        "| variable | values | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join(head + rows) + "\n"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs/environment.md").write_text(markdown())
