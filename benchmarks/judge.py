"""How a goal is judged: a verdict over rows, and why it is so as far as the rows tell."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from adapterkern.bench import roofline
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import Row
from adapterkern.bench.roofline import Machine

NOT_MEASURED = "-"
TF32 = "TF32"  # in the note of a row whose float32 products were allowed to round their factors
TF32_RATE = "matrix_rate_tf32"  # beside the calibration's own numbers


@dataclass(frozen=True)
class Verdict:
    """One promise: what was asked, what was found, and why as far as the rows tell.

    met is None where it was not measured, or is a time (absolute) that counts on another device;
    others: what the backends that auto does not run reach.
    """

    goal: str
    promise: str
    found: str = NOT_MEASURED
    met: bool | None = None
    why: str = ""
    others: tuple[str, ...] = ()
    absolute: bool = False

    @property
    def state(self) -> str:
        """The outcome in a word or two."""
        if self.met is None and self.found != NOT_MEASURED:
            return "for information"
        return {True: "met", False: "missed", None: "not measured"}[self.met]


@dataclass(frozen=True)
class Judge:
    """Rows of one choice of backends; `least` and `most` hold a promise against some of them."""

    rows: list[Row]
    calibration: dict[str, float]

    def of(self, mode: str, wanted: Callable[[BenchCase], bool]) -> "Judge":
        """Keep only the rows of a mode, and of the cases that are wanted."""
        kept = [row for row in self.rows if row.case.mode == mode and wanted(row.case)]
        return Judge(kept, self.calibration)

    def least(
        self,
        goal: str,
        promise: str,
        value: Callable[[Row], float | None],
        bound: float,
        form: Callable[[float], str],
        later: str = "",
    ) -> Verdict:
        """Judge that the least value is at least `bound`; later: what it shall be in the end."""
        promise = f"{promise} >= {form(bound)}{_later(later)}"
        known = self._known(value)
        if not known:
            return Verdict(goal, promise, why=self._why_not())
        found, row = min(known, key=lambda pair: pair[0])
        text = form(found) if found >= bound else f"{form(found)}, {form(bound - found)} short"
        return self._found(goal, promise, text, found >= bound, row)

    def most(
        self,
        goal: str,
        promise: str,
        value: Callable[[Row], float | None],
        bound: float,
        unit: str,
        later: str = "",
        absolute: bool = False,
    ) -> Verdict:
        """Judge that the greatest value is at most `bound`; absolute: a time of one device."""
        promise = f"{promise} <= {bound:g}{unit}{_later(later)}"
        known = self._known(value)
        if not known:
            return Verdict(goal, promise, why=self._why_not(), absolute=absolute)
        worst, row = max(known, key=lambda pair: pair[0])
        verdict = self._found(goal, promise, over(worst, bound, unit), worst <= bound, row)
        return replace(verdict, absolute=absolute)

    def _known(self, value: Callable[[Row], float | None]) -> list[tuple[float, Row]]:
        pairs = [(value(row), row) for row in self.rows if row.time is not None]
        return [(found, row) for found, row in pairs if found is not None]

    def _found(self, goal: str, promise: str, text: str, met: bool, row: Row) -> Verdict:
        """A case that went wrong is a miss, however fast the others are."""
        broken = self._broken()
        why = "; ".join(
            [_why(row, _machine(row, self.calibration)), *(f"without a time: {b}" for b in broken)]
        )
        return Verdict(goal, promise, text, met and not broken, why)

    def _broken(self) -> list[str]:
        return [
            f"{row.case} on {row.provider}, {row.status.replace('_', ' ')}"
            for row in self.rows
            if row.time is None
        ]

    def _why_not(self) -> str:
        if self._broken():
            return "; ".join(self._broken())
        return "the file lacks the baseline or the count" if self.rows else "no such case was run"


def _machine(row: Row, calibration: dict[str, float]) -> Machine | None:
    """Return what bounds a row's case, by the arithmetic that the row was measured with."""
    machine = from_dict(calibration).machine(row.case.dtype)
    if machine is None or TF32 not in row.note:
        return machine
    return replace(machine, matrix_rate=calibration.get(TF32_RATE))


def _why(row: Row, machine: Machine | None) -> str:
    """Return what bounds the case that decided, its kernels launched, and its bytes."""
    case, facts = row.case, []
    if machine is not None:
        facts.append(f"{roofline.bound(case, machine)}-bound")
    if row.kernels is not None:
        floor = len(roofline.kernels(case))
        facts.append(f"{row.kernels} kernels (floor {floor})")
    moved = roofline.moved_bytes(case) / 1e6
    if row.time is not None:
        facts.append(f"{moved:.3g} MB at least in {row.time.p50:.3g} us ({row.headline})")
    many = f"-A{case.adapters}" if case.adapters else ""
    return f"T{case.tokens}-{case.shape}{many} on {row.provider}: {', '.join(facts)}"


def _later(text: str) -> str:
    return f" (later {text})" if text else ""


def over(found: float, bound: float, unit: str) -> str:
    """Return the value found, and by how much it exceeds its bound where it does."""
    text = f"{found:.2f}{unit}"
    return text if found <= bound else f"{text}, {found - bound:.2f} over"
