"""What `longshore bench load` promises, beside what it measured: one line per figure, for people and for programs."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from loaders.bench_load import LoadBench

OURS = "longshore, pool"


class Figure(msgspec.Struct, frozen=True):
    """`reach` is a bound from below, or from above with `at_most`; None for what is told and not promised."""

    what: str
    measured: float
    reach: float | None = None
    at_most: bool = False
    unit: str = ""

    @property
    def reached(self) -> bool:
        if self.reach is None:
            return True
        return self.measured <= self.reach if self.at_most else self.measured >= self.reach

    def __str__(self) -> str:
        digits = 0 if self.unit == "ms" else 3 if abs(self.measured - 1) < 0.1 else 2
        words = f"{self.what}: {self.measured:.{digits}f} {self.unit}".rstrip()
        if self.reach is None:
            return words
        bound = f"{'at most' if self.at_most else 'at least'} {self.reach:g} {self.unit}".rstrip()
        return f"{words} ({bound}: {'reached' if self.reached else 'NOT REACHED'})"


def summarise(measured: dict[str, Any]) -> list[Figure]:
    """The figures of one size, of those parts that were measured."""
    figures: list[Figure] = []
    if "load" in measured:
        figures += _of_loads(measured["load"])
    for row in measured.get("attach", ()):
        huge = " 0% huge" not in row.memory and "unknown" not in row.memory
        touched = median(row.touched_ms)
        what = f"DRAM to usable parameters, {row.tensors} tensors, every page touched, {row.memory}"
        figures.append(Figure(what, touched, 60 if huge else None, True, "ms"))
    if (row := measured.get("http")) is not None:
        figures.append(Figure("http onto the disk and into memory, rate over that of curl to a file", row.ratio, 0.9))
    if (row := measured.get("together")) is not None:
        total = median(a / b for a, b in zip(row.at_once, row.after_each_other, strict=True))
        urgent = median(a / b for a, b in zip(row.with_priority, row.alone, strict=True))
        figures.append(Figure("two loads at once, time over that of one after the other", total, 1.0, True))
        figures.append(Figure("the one with priority, time over that of it alone", urgent, 1.15, True))
    if (row := measured.get("first-token")) is not None:
        what = "first token, cold, begun after the load over begun during it"
        figures.append(Figure(what, row.ratio, 1.2))
        figures.append(Figure("prefill over load", row.prefill_seconds / row.load_seconds, 1 / 3))
    return figures


def _of_loads(bench: LoadBench) -> list[Figure]:
    rows = {row.loader: row.median("share") for row in bench.rows}
    figures = [
        Figure("disk, read directly into huge pages", bench.probe, unit="GB/s"),
        Figure("disk, read directly into 4 KiB pages", bench.probe_small_pages, unit="GB/s"),
    ]
    ours = rows.get(OURS)
    if ours is None:
        return figures
    figures.append(Figure(f"{OURS}, share of the disk", ours, 0.95))
    others = {name: share for name, share in rows.items() if not name.startswith("longshore")}
    if others:
        best = max(others, key=lambda name: others[name])
        figures.append(Figure(f"share over that of the best of the others here ({best})", ours / others[best], 1.1))
    for name, reach in (("safetensors load_file", 2.0), ("from_pretrained", 2.5)):
        if name in others:
            figures.append(Figure(f"share over that of {name}", ours / others[name], reach))
    if (silent := rows.get("longshore, pool, no checksums")) is not None:
        figures.append(Figure("time with checksums over that without", silent / ours, 1.03, True))
    return figures
