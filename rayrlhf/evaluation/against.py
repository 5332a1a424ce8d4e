"""Two runs side by side: every figure that both have, the difference, and its interval.

The interval comes from those of the two figures alone (MOVER), as if the runs were independent of
each other. Runs that answered the same prompts are not, and their difference is surer than that.
Source: Zou and Donner 2008 (doi:10.1002/sim.3095).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rayrlhf import console
from rayrlhf.config import RecipeError
from rayrlhf.evaluation.cells import number, page, table
from rayrlhf.evaluation.cost_section import VARIETY
from rayrlhf.evaluation.plots.preference import word
from rayrlhf.evaluation.words import JUDGES, MODELS, ppo_model
from rayrlhf.lineage import read_json

Results = Mapping[str, Any]
Key = tuple[str, str]
"""What is measured, and of what: a model, or a source of the reward model's texts."""


@dataclass(frozen=True)
class Measured:
    """A figure of a run."""

    value: float
    bounds: tuple[float, float] | None = None
    """Of its 95% interval, where it has one."""


@dataclass(frozen=True)
class Difference:
    """A figure of this run and of the other, and this one less that one."""

    here: Measured
    there: Measured
    value: float
    bounds: tuple[float, float] | None

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval, and 0 is outside it."""
        return self.bounds is not None and not self.bounds[0] <= 0 <= self.bounds[1]


def compare_runs(run: Path, other: Path) -> Path:
    """Print the differences of the run in a folder to that in another, and write them as a page.

    Raises RecipeError when the other run has no results.
    """
    here = read_json(run / "evaluation" / "results.json")
    there = read_json(other / "evaluation" / "results.json")
    if not there:
        raise RecipeError(
            f"--against={other}: no evaluation/results.json there: give the folder of a run, and "
            "run `rayrlhf evaluate` with its recipe first"
        )
    found = differences(here, there)
    if not found:
        raise RecipeError(
            f"--against={other}: its results have no figure in common with those of {run}: "
            "evaluate it again with this version"
        )
    console.say(_terminal_table(found))
    page = run / "evaluation" / f"against-{other.resolve().name}.html"
    page.write_text(render(here, there, found, str(other)), encoding="utf-8")
    console.say(f"differences: {page.resolve()}")
    return page


def differences(here: Results, there: Results) -> dict[Key, Difference]:
    """Return what both runs measured, in the order of this run's."""
    others = dict(measures(there))
    return {
        key: difference(measured, others[key]) for key, measured in measures(here) if key in others
    }


def difference(here: Measured, there: Measured) -> Difference:
    """Return `here` - `there` with its interval, if both have one."""
    value = here.value - there.value
    if here.bounds is None or there.bounds is None:
        return Difference(here, there, value, None)
    (low, high), (other_low, other_high) = here.bounds, there.bounds
    down = ((here.value - low) ** 2 + (other_high - there.value) ** 2) ** 0.5
    up = ((high - here.value) ** 2 + (there.value - other_low) ** 2) ** 0.5
    return Difference(here, there, value, (value - down, value + up))


def measures(results: Results) -> Iterator[tuple[Key, Measured]]:
    """Yield every figure of results.json that another run can have, too."""
    reference = results["reference"]
    rates = f"win_rate_vs_{reference}"
    bounds = results["intervals"][rates]
    for model, judges in results[rates].items():
        for judge, rate in judges.items():
            if model != reference:
                name = f"win rate against {MODELS[reference]}, {JUDGES[judge]}"
                yield (name, model), Measured(rate, tuple(bounds[model][judge]))
    few_shot = results.get("few_shot")
    if few_shot is not None:
        for judge, rate in few_shot["win_rate"].items():
            name = f"win rate against {MODELS[reference]}, {JUDGES[judge]}"
            yield (name, few_shot["model"]), Measured(rate["value"], (rate["low"], rate["high"]))
    for model, rating in results["ratings"].items():
        if model != reference:
            yield (
                (f"rating against {MODELS[reference]}", model),
                Measured(rating["elo"], (rating["low"], rating["high"])),
            )
    for model, nats in results["kl_ref_per_response"].items():
        yield (f"KL from {MODELS[reference]}, nats per response", model), Measured(nats)
    yield from _costs(results)
    for source, row in results["reward_model"].items():
        yield ("reward model's pair accuracy", source), Measured(row["pair_accuracy"])


def _costs(results: Results) -> Iterator[tuple[Key, Measured]]:
    """Yield entropy, variety and held-out loss; an older run's results lack some of them."""
    entropy_bounds = results.get("entropy_intervals", {})
    for model, nats in results["entropy_nats_per_token"].items():
        interval = entropy_bounds.get(model)
        yield ("entropy, nats", model), Measured(nats, tuple(interval) if interval else None)
    for model, row in results.get("variety", {}).items():
        for key, found in row.items():
            yield (VARIETY[key], model), Measured(found["value"], (found["low"], found["high"]))
    for model, losses in results["held_out_loss"].items():
        for source, loss in losses.items():
            yield (f"held-out loss, {source}", model), Measured(loss)
    for model, rises in results.get("alignment_tax", {}).items():
        mean = sum(rises.values()) / max(1, len(rises))
        yield (("rise of the held-out loss over the base model's, mean of sources", model),
               Measured(mean))  # fmt: skip
    yield from _frontiers(results)


def _frontiers(results: Results) -> Iterator[tuple[Key, Measured]]:
    """Yield where the gold reward peaks and ends, of best-of-n and of PPO's checkpoints."""
    found = results.get("overoptimisation") or {}
    ppo = ppo_model(results["models"])
    for of, curve in (("best of n", found.get("best_of_n")), (ppo, found.get("ppo"))):
        if of and curve:
            last, peak = curve["points"][-1], curve["peak"]
            gold = "gold reward at the end, SDs of the reference"
            fall = "fall of the gold reward from its peak to the end"
            yield (gold, of), Measured(last["gold"], tuple(last["gold_interval"]))
            yield (fall, of), Measured(peak["fall"], tuple(peak["fall_interval"]))
            yield ("KL where the gold reward peaks, nats", of), Measured(peak["kl"])


def render(here: Results, there: Results, found: Mapping[Key, Difference], other: str) -> str:
    """Return the page: a table per measure, in the report's style, without outside assets."""
    names = escape(str(here["name"])), escape(str(there["name"]))
    by_measure: dict[str, list[list[str]]] = {}
    for (name, of), row in found.items():
        by_measure.setdefault(name, []).append(_row(of, row))
    tables = "".join(
        table(["of", "difference", str(here["name"]), str(there["name"])], rows, name)
        for name, rows in by_measure.items()
    )
    return page(
        f"{names[0]} against {names[1]}: rayrlhf",
        f"{names[0]} against {names[1]}",
        f"""<p>What both runs measured; the other run is {escape(other)}. Small figures are 95%
intervals. That of a difference takes the runs for independent: where they answered the same
prompts, it is wider than it need be. A bold difference is clear: its interval leaves out 0.</p>""",
        f"""<section><h2>Differences</h2>{tables}</section>""",
    )


def _row(of: str, row: Difference) -> list[str]:
    digits = 0 if abs(row.here.value) >= 100 else 3
    more = "" if row.bounds is None else "{:+.{d}f} to {:+.{d}f}".format(*row.bounds, d=digits)
    change = number(row.value, digits, more=more)
    return [
        f"<b>{escape(word(of))}</b>",
        f"<b>{change}</b>" if row.is_clear else change,
        *[_cell(measured, digits) for measured in (row.here, row.there)],
    ]


def _cell(measured: Measured, digits: int) -> str:
    bounds = measured.bounds
    more = "" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"
    return number(measured.value, digits, more=more)


def _terminal_table(found: Mapping[Key, Difference]) -> str:
    rows = [
        (
            name,
            word(of),
            row.here.value,
            row.there.value,
            f"{row.value:+.3f}",
            "" if row.bounds is None else f"{row.bounds[0]:+.3f} to {row.bounds[1]:+.3f}",
        )
        for (name, of), row in found.items()
    ]
    return console.table(("measure", "of", "here", "there", "difference", "95% interval"), rows)
