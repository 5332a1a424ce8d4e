"""The report's section on the battles: ratings, win rates of every pair, lengths, positions."""

from collections.abc import Mapping
from html import escape
from typing import Any

from rayrlhf import console
from rayrlhf.evaluation.cells import number, table
from rayrlhf.evaluation.words import JUDGES, MODELS

Found = Mapping[str, Any]


def battles_section(results: Mapping[str, Any]) -> str:
    """Return the tables of `battles`; nothing for a model without a rival."""
    battles = results["battles"]
    if len(battles["models"]) < 2:
        return ""
    anchor = escape(_model(battles["anchor"]))
    return (
        "<section><h2>Battles</h2>"
        f'<p class="note">Every pair of models met on the same {battles["num_prompts"]} prompts. '
        f"{anchor} is 1000 by definition; the small figures are 95% intervals.</p>"
        + _ratings_table(battles)
        + _length_table(battles)
        + "".join(_pairs_table(judge, found) for judge, found in battles["judges"].items())
        + "</section>"
    )


def summary_table(battles: Mapping[str, Any]) -> str:
    """Return the ratings by every judge, for the terminal."""
    judges = battles["judges"]
    return console.table(
        ("rating of", *(_judge(judge).removeprefix("the ") for judge in judges)),
        [
            (_model(model), *(_rating(found["ratings"][model]) for found in judges.values()))
            for model in battles["models"]
        ],
    )


def _ratings_table(battles: Found) -> str:
    judges = battles["judges"]
    first = next(iter(judges.values()))["ratings"]
    rows = [
        [
            f"<b>{escape(_model(model))}</b>",
            *[
                _with_interval(found["ratings"][model], "elo", 1.0, "")
                if model != battles["anchor"]
                else number(found["ratings"][model]["elo"], 0)
                for found in judges.values()
            ],
            number(battles["mean_length"][model], 0),
        ]
        for model in sorted(battles["models"], key=lambda model: -first[model]["elo"])
    ]
    header = ["model", *[f"rating, {_judge(judge)}" for judge in judges], "characters"]
    return table(header, rows, "Ratings of all models, by judge")


def _length_table(battles: Found) -> str:
    anchor, judges = battles["anchor"], battles["judges"]
    rows = []
    for model in battles["models"]:
        if model == anchor:
            continue
        row = [f"<b>{escape(_model(model))}</b>"]
        for found in judges.values():
            controlled = found["length_controlled_win_rate"][model]
            row += [
                number(found["win_rate"][model][anchor], 0, scale=100, unit="%"),
                _with_interval(controlled, "value", 100.0, "%"),
            ]
        rows.append(row)
    header = ["model"]
    for judge in judges:
        header += [f"{_judge(judge)}", f"{_judge(judge)}, at equal lengths"]
    return (
        f'<p class="note">Win rate against {escape(_model(anchor))}, as it is and as it would be '
        "with answers as long as its own.</p>"
        + table(header, rows, "Win rates as they are and at equal lengths")
    )


def _pairs_table(judge: str, found: Found) -> str:
    rates, bounds = found["win_rate"], found["win_rate_interval"]
    rows = []
    for model, row in rates.items():
        cells = [f"<b>{escape(_model(model))}</b>"]
        for rival in rates:
            if rival == model:
                cells.append('<span class="muted">&ndash;</span>')
                continue
            low, high = bounds[model][rival]
            more = f"{100 * low:.0f} to {100 * high:.0f}"
            cells.append(number(row[rival], 0, scale=100, unit="%", more=more))
        rows.append(cells)
    header = ["wins of", *[f"against {_model(model)}" for model in rates]]
    said = f"By {_judge(judge)}: {100 * found['tie_share']:.0f}% of the battles are ties."
    return f'<p class="note">{escape(said + _of_positions(found))}</p>' + table(
        header, rows, f"Win rates of each pair of models, by {judge}"
    )


def _of_positions(found: Found) -> str:
    """Say how a judge who saw both orders was swayed by them."""
    seen = found.get("positions")
    if seen is None:
        return ""
    said = f" {seen['asked']} were asked about in both orders"
    if seen["inconsistent_share"] is not None:
        said += f"; in {100 * seen['inconsistent_share']:.0f}% the verdict changed with the order"
    if seen["first_share"] is not None:
        said += f", and {100 * seen['first_share']:.0f}% of the wins went to the answer shown first"
    said += "."
    if seen["undecided"]:
        said += f" {seen['undecided']} got no verdict and are left out."
    return said


def _rating(rating: Mapping[str, float]) -> str:
    return f"{rating['elo']:.0f} ({rating['low']:.0f} to {rating['high']:.0f})"


def _with_interval(found: Mapping[str, float], key: str, scale: float, unit: str) -> str:
    more = f"{scale * found['low']:.0f} to {scale * found['high']:.0f}"
    return number(found[key], 0, scale=scale, unit=unit, more=more)


def _model(name: str) -> str:
    """What a model is called, of the run or not."""
    return MODELS.get(name, name)


def _judge(name: str) -> str:
    return JUDGES.get(name, name)
