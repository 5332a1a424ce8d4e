"""The page on several seeds: figures, and a table per measure with every run's number."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rayrlhf.evaluation.against import Key
from rayrlhf.evaluation.cells import figure_card, number, page, table
from rayrlhf.evaluation.plots import Figure
from rayrlhf.evaluation.plots.preference import word

if TYPE_CHECKING:
    from rayrlhf.evaluation.seeds import OverSeeds

Found = Mapping[Key, "OverSeeds"]


def render(
    runs: Sequence[Mapping[str, Any]], found: Found, paired: Found, drawn: Sequence[Figure]
) -> str:
    """Return the page, in the report's style, without outside assets."""
    seeds = sorted({int(results["seed"]) for results in runs})
    title = escape(str(runs[0]["name"]))
    cards = "".join(map(figure_card, drawn))
    return page(
        f"{title} over {len(seeds)} seeds: rayrlhf",
        f"{title} over {len(seeds)} seeds",
        f"""<p>{len(runs)} runs, seeds {", ".join(map(str, seeds))}. Small figures are 95% intervals
of the mean over seeds (Student's t): they hold what another seed would have changed, which the
intervals of a single run, over its prompts, do not.</p>""",
        f"""<section><h2>Figures</h2><div class="figures">{cards}</div></section>
<section><h2>Models</h2>{_tables(found, seeds)}</section>
{_paired(paired, seeds)}""",
    )


def _paired(paired: Found, seeds: Sequence[int]) -> str:
    if not paired:
        return ""
    return (
        "<section><h2>Differences</h2>"
        '<p class="note">Taken seed by seed, between models of the same seed. A bold difference is '
        "clear: its interval leaves out 0.</p>"
        + _tables(paired, seeds, of="difference", sign="+")
        + "</section>"
    )


def _tables(found: Found, seeds: Sequence[int], *, of: str = "of", sign: str = "") -> str:
    by_measure: dict[str, list[list[str]]] = {}
    for (name, model), row in found.items():
        by_measure.setdefault(name, []).append(_row(model, row, seeds, sign))
    header = [of, "mean", *(f"seed {seed}" for seed in seeds)]
    return "".join(table(header, rows, name) for name, rows in by_measure.items())


def _row(model: str, row: "OverSeeds", seeds: Sequence[int], sign: str) -> list[str]:
    digits = 0 if abs(row.mean) >= 100 else 3
    more = (
        ""
        if row.bounds is None
        else "{:{s}.{d}f} to {:{s}.{d}f}".format(*row.bounds, s=sign, d=digits)
    )
    mean = number(row.mean, digits, more=more, sign=sign)
    return [
        f"<b>{escape(word(model))}</b>",
        f"<b>{mean}</b>" if sign and row.is_clear else mean,
        *[number(row.by_seed.get(seed), digits, sign=sign) for seed in seeds],
    ]
