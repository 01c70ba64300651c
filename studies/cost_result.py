# SPDX-License-Identifier: Apache-2.0
"""A result of the study `cost`, arranged by what is asked of it."""

from typing import Any, NamedTuple

from studies.inference import KEPT, Counts, Ratio, kept, plain, ratio, uneven
from studies.study import Result


class Counted(NamedTuple):
    """Multiply-accumulates of a model by formula."""

    name: str
    full: int
    by_prompts: dict[int, dict[str, Any]]
    by_ratio: dict[float, dict[str, Any]]
    uneven: dict[str, int]

    def overhead(self, how: str) -> float:
        """Of the most prompts to none."""
        return self.by_prompts[self.full][how] / self.by_prompts[0][how]

    def saved(self, how: str) -> float:
        """Of `KEPT` of the prompts to all."""
        return self.by_ratio[KEPT][how] / self.by_ratio[1.0][how]


class Timed(NamedTuple):
    """A measured model's programs."""

    name: str
    full: int
    depth: int
    ratios: list[float]
    rows: dict[tuple[int, str, Counts], dict[str, Any]]
    noise: dict[int, Ratio]  # by batch size

    @property
    def batches(self) -> list[int]:
        return list(self.noise)

    @property
    def least(self) -> float:
        return min(self.ratios)

    @property
    def none(self) -> Counts:
        return (0,) * self.depth

    def even(self, left: float) -> Counts:
        return (kept(self.full, left),) * self.depth

    @property
    def uneven(self) -> Counts:
        return uneven(kept(self.full, KEPT), self.depth)

    def row(self, batch: int, how: str, counts: Counts) -> dict[str, Any]:
        return self.rows[batch, how if any(counts) else plain(how), counts]

    def ratio(self, batch: int, how: str, counts: Counts, base: Counts) -> Ratio:
        """Time, to the same formulation with other counts."""
        return ratio(*(self.row(batch, how, c)["ms"] for c in (counts, base)))

    def share(
        self, what: str, batch: int, how: str, counts: Counts, base: Counts
    ) -> str:
        """Another number of the rows (`macs`, `temporary`), likewise."""
        return share(*(self.row(batch, how, c)[what] for c in (counts, base)))


def arrange(result: Result) -> tuple[dict[str, Counted], list[Timed]]:
    """What is known by formula, by name; and what was measured."""
    counted = {
        model["name"]: Counted(
            model["name"],
            result["full"],
            {row["prompts"]: row for row in model["by_prompts"]},
            {row["ratio"]: row for row in model["by_ratio"]},
            model["uneven"],
        )
        for model in result["counted"]
    }
    depths = {model["name"]: model["depth"] for model in result["counted"]}
    timed = []
    for name in result["measured"]:
        rows = {
            (row["batch"], row["how"], tuple(row["counts"])): row
            for row in result["programs"]
            if row["model"] == name and row["ms"]
        }
        _, how, first = next(iter(rows))
        noise = {
            again["batch"]: ratio(again["ms"], rows[again["batch"], how, first]["ms"])
            for again in result["repeats"]
            if again["model"] == name
        }
        ratios = list(counted[name].by_ratio)
        full, depth = result["full"], depths[name]
        timed.append(Timed(name, full, depth, ratios, rows, noise))
    return counted, timed


def share(mine: int | float | None, other: int | float | None) -> str:
    """A ratio of two numbers as text; a dash where one is not known."""
    return f"{mine / other:.2f}" if mine and other else "–"
