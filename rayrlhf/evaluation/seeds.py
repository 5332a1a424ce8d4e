"""Runs of one recipe with several seeds: every figure's mean over the runs, and its interval.

The interval of a single run is over its prompts; what another seed would have trained is not in it.
Here the runs are the sample: Student's t over their figures. A model's difference to another is
taken seed by seed, so that what both share (data order, base model, prompts) cancels out.
Source: Student 1908 (doi:10.1093/biomet/6.1.1); Agarwal et al. 2021 (arXiv:2108.13264) on why.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf import console
from rayrlhf.config import RecipeError
from rayrlhf.evaluation import seeds_page
from rayrlhf.evaluation.against import Key, Results, measures
from rayrlhf.evaluation.plots import seeds as plots
from rayrlhf.evaluation.plots.preference import word
from rayrlhf.evaluation.words import last_model
from rayrlhf.lineage import read_json, write_json

PAIRS = (("sft", "base"), ("dpo", "sft"), ("ppo", "sft"), ("ppo_ptx", "sft"), ("ppo_ptx", "ppo"))
"""Models whose differences are shown: each and what it came from, or competes with."""
# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class OverSeeds:
    """A figure of several runs."""

    by_seed: dict[int, float]
    mean: float
    bounds: tuple[float, float] | None
    """Of the 95% interval of the mean; None with one run."""

    @classmethod
    def of(cls, by_seed: Mapping[int, float]) -> "OverSeeds":
        """Return mean and Student's interval of one value per seed."""
        values = np.array(list(by_seed.values()))
        mean = float(values.mean())
        if len(values) < 2:
            return cls(dict(by_seed), mean, None)
        half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5
        return cls(dict(by_seed), mean, (mean - half, mean + half))

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval, and 0 is outside it: of interest for a difference."""
        return self.bounds is not None and not self.bounds[0] <= 0 <= self.bounds[1]

    def as_dict(self) -> dict[str, Any]:
        """Return it as seeds.json has it."""
        low, high = self.bounds or (None, None)
        return {"mean": self.mean, "low": low, "high": high, "by_seed": self.by_seed}


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t, to 0.001."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    # Cornish and Fisher's expansion in 1 / degrees of freedom.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(z + sum(term / freedom**n for n, term in enumerate(terms, 1)))


def report_seeds(run: Path, others: Sequence[Path]) -> Path:
    """Print what the runs in these folders have in common over their seeds, and write the page.

    A run with `ppo.ptx_coef` beside one without it, of the same seed, adds PPO-ptx to the figure.
    Raises RecipeError when a run has no results, or is no other seed or model than one before.
    """
    runs = _read(run, others)
    found = over_seeds(runs)
    paired = differences(runs)
    rows = [
        {"measure": name, "of": of, **row.as_dict()}
        for part in (found, paired)
        for (name, of), row in part.items()
    ]
    folder = run / "evaluation"
    paths = [str(path) for path in (run, *others)]
    write_json(folder / "seeds.json", {"runs": paths, "rows": rows})
    drawn = plots.figures(runs, found)
    for figure in drawn:
        (folder / f"{figure.name}.png").write_bytes(figure.light)
    page = folder / "seeds.html"
    page.write_text(seeds_page.render(runs, found, paired, drawn), encoding="utf-8")
    console.say(_terminal_table(found))
    if paired:
        console.say("\n" + _terminal_table(paired))
    console.say(f"over seeds: {page.resolve()}")
    return page


def over_seeds(runs: Sequence[Results]) -> dict[Key, OverSeeds]:
    """Return every figure of the runs, in the order of the first, with what only others have last.

    Models that several runs of one seed have (base and SFT of one with PPO and one with PPO-ptx)
    count once.
    """
    return {key: OverSeeds.of(values) for key, values in _values(runs).items()}


def differences(runs: Sequence[Results]) -> dict[Key, OverSeeds]:
    """Return what models gained on each other in each figure, seed by seed; one is not enough."""
    values = _values(runs)
    found: dict[Key, OverSeeds] = {}
    for model, other in PAIRS:
        for (name, of), mine in values.items():
            theirs = values.get((name, other), {})
            both = {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}
            if of == model and len(both) > 1:
                found[name, f"{word(model)} less {word(other)}"] = OverSeeds.of(both)
    return found


def _values(runs: Sequence[Results]) -> dict[Key, dict[int, float]]:
    found: dict[Key, dict[int, float]] = {}
    for results in runs:
        for key, measured in measures(results):
            found.setdefault(key, {}).setdefault(int(results["seed"]), measured.value)
    return found


def _read(run: Path, others: Sequence[Path]) -> list[Results]:
    runs: list[Results] = []
    for path in (run, *others):
        results = read_json(path / "evaluation" / "results.json")
        if not results:
            raise RecipeError(
                f"--seeds {path}: no evaluation/results.json there: give folders of runs that "
                "`rayrlhf pipeline` has finished"
            )
        runs.append(results)
    trained = Counter((results["seed"], last_model(results)) for results in runs)
    (seed, model), times = trained.most_common(1)[0]
    if times > 1:
        raise RecipeError(
            f"--seeds: {times} of the runs have seed {seed} and end with {model}: give runs with "
            "other seeds, such as `rayrlhf pipeline RECIPE seed=1 run_dir=runs/NAME-1`"
        )
    if len({results["reference"] for results in runs}) > 1:
        raise RecipeError(
            "--seeds: some of the runs have SFT and some have not: their win rates are against "
            "different models: give runs of one recipe"
        )
    return runs


def _terminal_table(found: Mapping[Key, OverSeeds]) -> str:
    rows = [
        (
            name,
            word(of),
            len(row.by_seed),
            row.mean,
            "" if row.bounds is None else "{:.3f} to {:.3f}".format(*row.bounds),
        )
        for (name, of), row in found.items()
    ]
    return console.table(("measure", "of", "seeds", "mean", "95% interval"), rows)
