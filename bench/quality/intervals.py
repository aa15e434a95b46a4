"""Accuracy with 95 % confidence intervals from a paired bootstrap over images, and the tables made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERALL = "overall"
WITHOUT_COUNT = "without count"


@dataclass(frozen=True)
class Outcome:
    """Right and wrong answers of one configuration, in the order of the samples."""

    method: str
    keep: float
    tokens: int
    right: Sequence[bool]


class Bootstrap:
    """One set of resampled images, shared by every configuration, so that differences are paired.

    Args:
        image_of: For each sample, the number of its image.
        type_of: For each sample, its question type.
        draws: Number of resamples.
        seed: Seed of the resampling.
    """

    def __init__(self, image_of: Sequence[int], type_of: Sequence[str], draws: int = 2000, seed: int = 0) -> None:
        self.images = np.asarray(image_of)
        self.n_images = int(self.images.max()) + 1
        types = np.asarray(type_of)
        self.columns = {kind: types == kind for kind in dict.fromkeys(type_of)}
        if len(self.columns) > 1:
            if "count" in self.columns:
                self.columns[WITHOUT_COUNT] = types != "count"
            self.columns[OVERALL] = np.ones(len(types), dtype=bool)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(self.n_images, np.full(self.n_images, 1 / self.n_images), size=draws)

    def _draws(self, values: np.ndarray, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean of `values` over the chosen samples, and the same for every resample."""
        total = np.bincount(self.images[chosen], weights=values[chosen], minlength=self.n_images)
        number = np.bincount(self.images[chosen], minlength=self.n_images)
        return float(values[chosen].mean()), (self.weights @ total) / np.maximum(self.weights @ number, 1)

    def accuracy(self, right: Sequence[bool]) -> dict[str, dict[str, float]]:
        """Per type: accuracy in percent and its 95 % interval."""
        values = 100 * np.asarray(right, dtype=float)
        return {kind: self._interval(values, chosen) for kind, chosen in self.columns.items()}

    def difference(self, right: Sequence[bool], other: Sequence[bool]) -> dict[str, dict[str, float]]:
        """Per type: `right` minus `other` in points and its paired 95 % interval."""
        values = 100 * (np.asarray(right, dtype=float) - np.asarray(other, dtype=float))
        return {kind: self._interval(values, chosen) for kind, chosen in self.columns.items()}

    def _interval(self, values: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
        mean, draws = self._draws(values, chosen)
        low, high = np.percentile(draws, [2.5, 97.5])
        return {"mean": round(mean, 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def summarise(outcomes: list[Outcome], bootstrap: Bootstrap) -> list[dict]:
    """One row per configuration: accuracy, difference from dense and, at the same keep, from random pruning."""
    dense = next((o for o in outcomes if o.method == "dense"), None)
    random = {o.keep: o for o in outcomes if o.method == "random"}
    rows = []
    for outcome in outcomes:
        row = {"method": outcome.method, "keep": outcome.keep, "tokens": outcome.tokens}
        row["accuracy"] = bootstrap.accuracy(outcome.right)
        if dense and outcome is not dense:
            row["minus_dense"] = bootstrap.difference(outcome.right, dense.right)
        if outcome.keep in random and outcome.method not in ("dense", "random"):
            row["minus_random"] = bootstrap.difference(outcome.right, random[outcome.keep].right)
        rows.append(row)
    return rows


def markdown(rows: list[dict], figure: str = "accuracy") -> str:
    """A table of one figure of the rows: mean and half the width of its interval."""
    rows = [row for row in rows if figure in row]
    if not rows:
        return ""
    kinds = list(rows[0][figure])
    lines = ["| method | keep | tokens | " + " | ".join(kinds) + " |", "|---|---|---|" + "---|" * len(kinds)]
    for row in rows:
        cells = [f"{c['mean']:.1f} ±{(c['high'] - c['low']) / 2:.1f}" for c in row[figure].values()]
        lines.append(f"| {row['method']} | {row['keep']:g} | {row['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
