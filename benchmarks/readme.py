"""The README's performance section, generated from the best committed GPU result."""

from pathlib import Path

from adapterkern.backends import NAMES
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result, ResultError, Row
from benchmarks import goals, pictures, records, summary
from benchmarks.gpu.output import ROWS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
REPORT = "report"  # the stem of what is drawn into a result's folder
BEGIN = "<!-- performance: written by `python -m benchmarks readme` -->"
END = "<!-- end of performance -->"
NO_RESULT = (
    "No GPU result yet: no kernel of this package has been timed on a GPU, so there is no number "
    "here.\n`python -m benchmarks gpu --stage report --out DIR` measures one. "
    "The goals, for an H200 in bfloat16:"
)
PREFERRED = ("H200", "H100")  # the goals are stated for the first
TOKENS = (16, 2048, 16384)
BASELINES = ("adapterhub", "plain", "addmm", "compile", "cublaslt")
UNSTEADY = "**Clocks or memory moved by more than 3 % during this run; measure it again.**"
UNFINISHED = "**No report of this machine is finished yet: rows are missing.**"


class MarkerError(ValueError):
    """The README lacks the comments between which the section goes."""


def best(folder: Path = RESULTS) -> Path | None:
    """The folder of the GPU result that the README shows, None if there is none: a finished one
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


def section(folder: Path | None, root: Path = ROOT) -> str:
    """What goes between the markers."""
    if folder is None:
        return f"{NO_RESULT}\n\n{summary.goals_table(Result())}"
    result = records.load(folder / ROWS)
    commit = (result.header.get("commit") or "unknown")[:9]
    versions = result.header.get("versions", {})
    where = folder.relative_to(root).as_posix()
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
        summary.goals_table(result),
    ]
    images = [folder / f"{REPORT}-{mode}.png" for mode in ("forward", "step")]
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
    """Write the best result's pictures and tables anew and the README; the result's folder.

    Raises:
        ResultError: a result cannot be read, or a picture not drawn.
        MarkerError: the README has no place for the section.
    """
    folder = best(results)
    if folder is not None:
        result = records.load(folder / ROWS)
        _, problems = pictures.draw(result, folder / REPORT)
        if problems:
            raise ResultError(f"no picture for the README: {'; '.join(problems)}")
        (folder / f"{REPORT}.md").write_text(summary.summary(result), encoding="utf-8")
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replaced(text, section(folder, readme.parent)), encoding="utf-8")
    return folder
