"""The README's performance section, generated from the newest committed GPU result."""

from pathlib import Path

from adapterkern.backends import NAMES
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result, ResultError, Row, load
from benchmarks import goals, pictures, summary

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- performance: written by `python -m benchmarks readme` -->"
END = "<!-- end of performance -->"
NO_RESULT = (
    "No GPU result yet: no kernel of this package has been timed on a GPU, so there is no number "
    "here.\n`python -m benchmarks report --out benchmarks/results/<gpu>` writes one. "
    "The goals, on an H200 in bfloat16:"
)
TOKENS = (16, 2048, 16384)
BASELINES = ("adapterhub", "plain", "addmm", "compile", "cublaslt")
UNSTEADY = "**The copy bandwidth moved by more than 3 % during this run; measure it again.**"


class MarkerError(ValueError):
    """The README lacks the comments between which the section goes."""


def newest(folder: Path = RESULTS) -> Path | None:
    """The newest GPU result in the folders below `folder`, None if there is none.

    Raises:
        ResultError: a file there is not a result of this schema.
    """
    found = [(load(path), path) for path in sorted(folder.glob("*/*.json"))]
    on_gpu = [(result.header["created"], path) for result, path in found if result.on_gpu]
    return max(on_gpu)[1] if on_gpu else None


def section(path: Path | None, root: Path = ROOT) -> str:
    """What goes between the markers."""
    if path is None:
        return f"{NO_RESULT}\n\n{summary.goals_table(Result())}"
    result = load(path)
    commit = (result.header.get("commit") or "unknown")[:9]
    versions = result.header.get("versions", {})
    where = path.relative_to(root).as_posix()
    text = path.with_suffix(".md")
    parts = [
        f"{result.device}, torch {versions.get('torch')}, triton {versions.get('triton')}, commit "
        f"{commit}, {result.header['created'][:10]}: "
        f"[all rows]({text.relative_to(root).as_posix()}), [{path.name}]({where}). "
        'Times of one adapter on the backend that `"auto"` runs; '
        "`vs` is that implementation's time over ours, `of floor` the least traffic at the copy "
        "bandwidth measured in the same run.",
        *([UNSTEADY] if from_dict(result.header["calibration"]).steady is False else []),
        summary.adapters(_telling(result), on_gpu=True, baselines=BASELINES),
        summary.goals_table(result),
    ]
    images = [path.with_name(f"{path.stem}-{mode}.png") for mode in ("forward", "step")]
    parts += [
        f"![time against tokens]({image.relative_to(root).as_posix()})"
        for image in images
        if image.exists()
    ]
    return "\n\n".join(parts)


def _telling(result: Result) -> list[Row]:
    """A decode, a prompt and a batch on the backend that "auto" runs: what a reader looks for."""
    rows = goals.auto_rows(result.rows, result.header.get("backends", NAMES))
    kept = [
        row
        for row in rows
        if row.case.tokens in TOKENS
        and row.case.dtype == "bf16"
        and row.case.mode in ("forward", "step")
    ]
    return sorted(kept, key=_place)


def _place(row: Row) -> tuple[str, int, int, int]:
    case = row.case
    return case.mode, case.hidden_size, case.bottleneck_size, case.tokens


def replaced(text: str, content: str) -> str:
    """The README with `content` between its markers.

    Raises:
        MarkerError: the markers are missing, or not in order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise MarkerError(
            "README.md has no place for the performance section.\n"
            f"  hint: put these two lines where it goes:\n{BEGIN}\n{END}"
        )
    return f"{text[: begin + len(BEGIN)]}\n{content}\n{text[end:]}"


def write(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> Path | None:
    """Write the newest result's pictures and summary anew and the README; the result's path.

    Raises:
        ResultError: a result cannot be read, or a picture not drawn.
        MarkerError: the README has no place for the section.
    """
    path = newest(results)
    if path is not None:
        result = load(path)
        _, problems = pictures.draw(result, path)
        if problems:
            raise ResultError(f"no picture for the README: {'; '.join(problems)}")
        path.with_suffix(".md").write_text(summary.summary(result), encoding="utf-8")
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replaced(text, section(path, readme.parent)), encoding="utf-8")
    return path
