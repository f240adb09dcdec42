"""Writes what README and docs show of results: the best GPU result, the model, the demo's run."""

from collections import Counter
from pathlib import Path

from adapterkern.backends import NAMES
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result, ResultError, Row
from benchmarks import block_model, demo_page, goals, many_model, model, pictures, records, summary
from benchmarks.gpu.output import ROWS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
REPORT = "report"  # the stem of what is drawn into a result's folder
GOALS = "docs/benchmarks.md"
MODEL = "docs/performance.md"
# An index shows the README without the tree around it, so that its links and pictures are absolute.
HOME = "https://github.com/adapterkern/adapterkern"  # as [project.urls] of pyproject.toml has it
FILES = f"{HOME}/blob/main"
PICTURES = f"{HOME}/raw/main"
NO_RESULT = (
    "All kernels were compared with float64 on CPUs alone (see above), and none has been timed on a"
    f"\nGPU, so no [goal]({FILES}/{GOALS}#goals) has been measured."
)
PREFERRED = ("H200", "H100")  # the goals are stated for the first
TOKENS = (16, 2048, 16384)
BASELINES = ("adapterhub", "plain", "addmm", "compile", "cublaslt", "separate")
UNSTEADY = "**Clocks or memory moved by more than 3 % during this run; measure it again.**"
UNFINISHED = "**No report of this machine is finished yet: rows are missing.**"


class MarkerError(ValueError):
    """A page lacks the comments between which a section goes."""


def best(folder: Path = RESULTS) -> Path | None:
    """Find the folder of the GPU result that the pages show, None if there is none: a finished one
    before others, an H200's before an H100's before another GPU's, the newest of these.

    Raises:
        ResultError: a file there is not a result of this schema.
    """
    ranked = []
    for path in sorted(folder.glob(f"*/*/{ROWS}")):
        result = records.load(path)
        if result.on_gpu:
            names = [name in result.device for name in PREFERRED]
            rank = bool(result.header["finished"]), names, result.header["created"]
            ranked.append((rank, path.parent))
    return max(ranked)[1] if ranked else None


def sections(folder: Path | None, root: Path = ROOT) -> dict[str, tuple[str, str]]:
    """Return by page the name in its markers, and what goes between them."""
    card = model.CARDS["h200"]
    calls = model.table(list(model.predictions(card)))
    blocks = block_model.table(list(block_model.overheads(card)))
    many = many_model.table(list(many_model.predictions(card)))
    predicted = {MODEL: ("model", f"{calls}\n\n{blocks}\n\n{many}")}
    demo = demo_page.section(root)
    if demo is not None:
        predicted[demo_page.PAGE] = ("demo", demo)
    if folder is None:
        return predicted | {
            "README.md": ("performance", NO_RESULT),
            GOALS: ("goals", summary.goals_table(Result())),
        }
    result = records.load(folder / ROWS)
    where = folder.relative_to(root).as_posix()
    source = f"Found on {result.device}: [all rows](../{where}/{REPORT}.md)."
    return predicted | {
        "README.md": ("performance", _performance(result, folder, root)),
        GOALS: ("goals", f"{source}\n\n{summary.goals_table(result)}"),
    }


def _performance(result: Result, folder: Path, root: Path) -> str:
    commit = (result.header.get("commit") or "unknown")[:9]
    versions = result.header.get("versions", {})
    where = f"{FILES}/{folder.relative_to(root).as_posix()}"
    parts = [
        f"{result.device}, torch {versions.get('torch')}, triton {versions.get('triton')}, commit "
        f"{commit}, {result.header['created'][:10]}: "
        f"[all rows]({where}/{REPORT}.md), [raw]({where}/{ROWS}). "
        'Times of one adapter on the backend that `"auto"` runs; `of copy` is the time of a copy '
        "of the same tensors in the same run over ours, `of peak` the least traffic at the "
        "memory's peak bandwidth over ours, `vs` that implementation's time over ours.",
        *([] if result.header["finished"] else [UNFINISHED]),
        *([UNSTEADY] if from_dict(result.header["calibration"]).steady is False else []),
        summary.adapters(_telling(result), on_gpu=True, baselines=BASELINES),
        f"Of the [goals]({FILES}/{GOALS}#goals), {_count_states(result)}.",
    ]
    images = [folder / f"{REPORT}-{mode}.png" for mode in ("forward", "step")]
    parts += [
        f"![time against tokens]({PICTURES}/{image.relative_to(root).as_posix()})"
        for image in images
        if image.exists()
    ]
    return "\n\n".join(parts)


def _count_states(result: Result) -> str:
    states = Counter(verdict.state for verdict in goals.verdicts(result))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _telling(result: Result) -> list[Row]:
    """Pick a decode, a prompt and a batch on "auto"'s backend, which a reader looks for."""
    rows = goals.auto_rows(result.rows, result.header.get("backends", NAMES))
    kept = [
        row
        for row in rows
        if row.case.kind != "many"
        and row.case.tokens in TOKENS
        and row.case.dtype == "bf16"
        and row.case.mode in ("forward", "step")
    ]
    return sorted(kept, key=_place)


def _place(row: Row) -> tuple[str, str, int, int, int]:
    case = row.case
    return case.norm, case.mode, case.hidden_size, case.bottleneck_size, case.tokens


def markers(name: str) -> tuple[str, str]:
    """Return the comments between which a section of this name goes."""
    return f"<!-- {name}: written by `python -m benchmarks readme` -->", f"<!-- end of {name} -->"


def updated(folder: Path | None, root: Path = ROOT) -> dict[Path, str]:
    """Return every page with its section written anew.

    Raises:
        MarkerError: the markers of a page are missing, or not in order.
    """
    pages = {}
    for page, (name, content) in sections(folder, root).items():
        text = (root / page).read_text(encoding="utf-8")
        first, last = markers(name)
        begin, end = text.find(first), text.find(last)
        if begin < 0 or end < begin:
            raise MarkerError(
                f"{page} has no place for the section {name!r}.\n"
                f"  hint: put these two lines where it goes:\n{first}\n{last}"
            )
        pages[root / page] = f"{text[: begin + len(first)]}\n{content}\n{text[end:]}"
    return pages


def write(root: Path = ROOT, results: Path = RESULTS) -> Path | None:
    """Write the best result's pictures and tables anew, the demo's picture, and the pages; the
    result's folder.

    Raises:
        ResultError: a result cannot be read, or a picture not drawn.
        MarkerError: a page has no place for its section; then no page has changed.
    """
    folder = best(results)
    if folder is not None:
        result = records.load(folder / ROWS)
        _, problems = pictures.draw(result, folder / REPORT)
        if problems:
            raise ResultError(f"no picture for the README: {'; '.join(problems)}")
        (folder / f"{REPORT}.md").write_text(summary.summary(result), encoding="utf-8")
    demo_page.draw(root)
    for path, text in updated(folder, root).items():
        path.write_text(text, encoding="utf-8")
    return folder
