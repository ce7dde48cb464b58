"""The figures that the kernels are held to, computed from the rows of a result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OURS, DENSE, PEER = "ours", "dense", "peer"
#: What autograd's own time is measured by.
NOTHING = "autograd.Function that does nothing"


@dataclass(frozen=True)
class Reading:
    """One number of a figure: what was measured (None for nothing), and the bounds that it must and should keep."""

    label: str
    value: float | None
    must: float
    aim: float
    at_least: bool = False
    unit: str = ""
    note: str = ""

    @property
    def state(self) -> str:
        if self.value is None:
            return "not measured"
        if self.value != self.value:  # NaN keeps no bound
            return "missed"
        for bound, state in ((self.aim, "aim met"), (self.must, "met")):
            if self.value >= bound if self.at_least else self.value <= bound:
                return state
        return "missed"

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{_number(self.value)}{self.unit}"
        return " ".join(word for word in (self.label, value, self.note) if word)


@dataclass(frozen=True)
class Figure:
    """A line of the table: its words, and its readings, all of which must keep their bounds."""

    text: str
    must: str
    aim: str
    readings: tuple[Reading, ...]

    @property
    def state(self) -> str:
        """The worst of the readings; a part that was not measured never counts as met."""
        states = [reading.state for reading in self.readings] or ["not measured"]
        missed = [str(reading) for reading in self.readings if reading.state == "missed"]
        if missed:
            return "missed" if len(missed) == len(states) else f"missed: {'; '.join(missed)}"
        return next(state for state in ("not measured", "met", "aim met") if state in states)


def _number(value: float) -> str:
    if value == float("inf"):
        return "never"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ---- rows ---------------------------------------------------------------------------------------------------------


def compare(rows: list[dict]) -> None:
    """Write into each of our rows of one case how many times faster it is than the best dense kernel and best peer."""
    for row in rows:
        if row["kind"] != OURS:
            continue
        rivals = {
            "vs_dense": [other for other in rows if other["kind"] == DENSE],
            "vs_peer": [other for other in rows if other["kind"] == PEER and other["pattern"] == row["pattern"]],
        }
        for key, others in rivals.items():
            row[key] = {}
            for measure in ("forward", "backward", "both"):
                timed = [other for other in others if measure in other]
                if timed and measure in row:
                    best = min(timed, key=lambda other: other[measure]["ms"])
                    times = best[measure]["ms"] / row[measure]["ms"]
                    row[key][measure] = {"times": times, "what": best["what"]}


def _ours(rows: list[dict], case: str, starts: str, *, union: bool = False) -> dict | None:
    """Our row of a case whose pattern starts so, alone or (`union`) joined with another."""
    for row in rows:
        found = row["case"] == case and row["kind"] == OURS and row["pattern"].startswith(starts)
        if found and union == (" | " in row["pattern"]):
            return row
    return None


def _at(row: dict | None, *path: str) -> float | None:
    found: object = row
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, int | float) else None


# ---- the table ----------------------------------------------------------------------------------------------------


def figures(result: dict) -> tuple[Figure, ...]:
    """Every figure, measured from a result's rows."""
    rows: list[dict] = result["rows"]

    def share(starts: str, measure: str, bounds: dict[str, tuple[float, float]]) -> Iterator[Reading]:
        short = {"forward": "fwd", "backward": "bwd"}[measure]
        for case, (must, aim) in bounds.items():
            value = _at(_ours(rows, case, starts), measure, "share")
            yield Reading(f"{case} {short}", value, must, aim)

    strided, union = _ours(rows, "S4", "Strided"), _ours(rows, "S1", "Local", union=True)
    fixed = _ours(rows, "S1", "Fixed")
    return (
        Figure(
            "Strided on S1, S1w, S3, forward / floor",
            "<= 1.3",
            "<= 1.15",
            tuple(share("Strided", "forward", dict.fromkeys(("S1", "S1w", "S3"), (1.3, 1.15)))),
        ),
        Figure(
            "Strided backward / floor: S1 and S1w; S3",
            "<= 1.6; 1.9",
            "<= 1.25; 1.3",
            tuple(share("Strided", "backward", {"S1": (1.6, 1.25), "S1w": (1.6, 1.25), "S3": (1.9, 1.3)})),
        ),
        Figure(
            "Local on S1, S1w, forward; backward / floor",
            "<= 1.45; 1.9",
            "<= 1.2; 1.4",
            (
                *share("Local", "forward", dict.fromkeys(("S1", "S1w"), (1.45, 1.2))),
                *share("Local", "backward", dict.fromkeys(("S1", "S1w"), (1.9, 1.4))),
            ),
        ),
        Figure(
            "Local on S3, forward; backward / floor",
            "<= 1.8; 2.2",
            "<= 1.4; 1.8",
            (*share("Local", "forward", {"S3": (1.8, 1.4)}), *share("Local", "backward", {"S3": (2.2, 1.8)})),
        ),
        Figure(
            "S2 strided, forward; backward / floor",
            "<= 1.5; 1.6",
            "<= 1.2; 1.25",
            (*share("Strided", "forward", {"S2": (1.5, 1.2)}), *share("Strided", "backward", {"S2": (1.6, 1.25)})),
        ),
        Figure(
            "S4 strided, TFLOP/s over allowed pairs, forward; backward",
            ">= 300; 250",
            ">= 450; 400",
            (
                Reading("fwd", _at(strided, "forward", "tflops"), 300, 450, at_least=True),
                Reading("bwd", _at(strided, "backward", "tflops"), 250, 400, at_least=True),
            ),
        ),
        Figure(
            "Local | Strided in one softmax, S1: ms forward; backward",
            "<= 0.25; 0.55",
            "<= 0.20; 0.40",
            (
                Reading("fwd", _at(union, "forward", "ms"), 0.25, 0.20),
                Reading("bwd", _at(union, "backward", "ms"), 0.55, 0.40),
            ),
        ),
        Figure(
            "Fixed(128, 32) merged, S1, against the best dense kernel, both ways",
            ">= 2.5x",
            ">= 3.5x",
            tuple(
                Reading(short, _at(fixed, "vs_dense", measure, "times"), 2.5, 3.5, at_least=True, unit="x")
                for measure, short in (("forward", "fwd"), ("backward", "bwd"))
            ),
        ),
        Figure(
            "every pattern on every case, against the best peer for that very pattern",
            "never below 0.95x",
            ">= 1.2x",
            tuple(_against_peers(rows)),
        ),
        Figure(
            "Strided (stride ~ sqrt(T)) against the best dense kernel, fwd+bwd, at T = 12K, 64K, 1M "
            "(dense 1M extrapolated from 256K)",
            ">= 12x, 60x, 600x",
            ">= 14x, 90x, 1000x",
            tuple(
                Reading(
                    label,
                    _at(_ours(rows, case, "Strided"), "vs_dense", "both", "times"),
                    must,
                    aim,
                    at_least=True,
                    unit="x",
                )
                for label, case, must, aim in (
                    ("12K", "T12288", 12, 14),
                    ("64K", "T65536", 60, 90),
                    ("1M", "T1048576", 600, 1000),
                )
            ),
        ),
        Figure(
            "shortest T at which Local | Strided (stride ~ sqrt(T)) beats the best dense kernel, fwd+bwd",
            "<= 1024",
            "<= 512",
            (Reading("T =", shortest_win(rows), 1024, 512),),
        ),
        Figure(
            "plan + launch overhead on the CPU side, warm",
            "<= 60 us",
            "<= 30 us",
            tuple(_host_time(result.get("overhead") or {})),
        ),
    )


def _host_time(overhead: dict) -> Iterator[Reading]:
    """Plan and launch alone: less what autograd takes for a function that does nothing."""
    for measure, short in (("forward", "fwd"), ("backward", "bwd")):
        ours, nothing = (_at(overhead, f"{name} {measure}", "us") for name in ("ours", NOTHING))
        # The forward is timed without gradients, so that autograd has no part in it.
        spent = ours if ours is None or nothing is None or measure == "forward" else ours - nothing
        yield Reading(short, spent, 60, 30, unit=" us")


def _against_peers(rows: list[dict]) -> Iterator[Reading]:
    """The worst of all cases and both ways; a case of ours that was not timed at all is a reading too."""
    rows = [row for row in rows if row["kind"] == OURS and not row["scaling"]]
    ratios = [
        (row["vs_peer"][measure]["times"], f"({row['case']} {row['pattern']} {measure})")
        for row in rows
        for measure in ("forward", "backward")
        if measure in row.get("vs_peer", {})
    ]

    def bound(label: str, value: float | None, note: str = "") -> Reading:
        return Reading(label, value, 0.95, 1.2, at_least=True, unit="x", note=note)

    worst, where = min(ratios, default=(None, ""))
    yield bound("worst", worst, note=where)
    yield from (bound(f"{row['case']} {row['pattern']}", None) for row in rows if "forward" not in row)


def shortest_win(rows: list[dict]) -> float | None:
    """The shortest length from which on Local | Strided beats dense at every measured length; inf for never."""
    points = []
    for row in rows:
        times = _at(row, "vs_dense", "both", "times")
        if row.get("scaling") and row["kind"] == OURS and " | " in row["pattern"] and times is not None:
            points.append((row["length"], times > 1))
    if not points:
        return None
    shortest = float("inf")
    for length, won in sorted(points, reverse=True):
        if not won:
            break
        shortest = length
    return shortest
