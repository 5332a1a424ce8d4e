"""The figure of the battles: ratings with their intervals, by every judge."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import Figure, Theme, render
from rayrlhf.evaluation.words import JUDGES, MODELS


def ratings(results: Mapping[str, Any]) -> Figure | None:
    """Draw a row for each model and judge; None without a rival."""
    battles = results["battles"]
    models, judges = battles["models"], battles["judges"]
    if len(models) < 2:
        return None
    rows = [(model, judge) for model in models for judge in judges]

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        for y, (model, judge) in enumerate(reversed(rows)):
            found = judges[judge]["ratings"][model]
            colour = theme.colours.get(model, theme.colours["human"])
            ax.plot(
                [found["low"], found["high"]],
                [y, y],
                color=colour,
                linewidth=3,
                alpha=0.45,
                solid_capstyle="round",
            )
            ax.plot(found["elo"], y, "o", color=colour, markersize=7)
        ax.set_yticks(
            range(len(rows)),
            [f"{MODELS.get(m, m)}, {_short(judge)}" for m, judge in reversed(rows)],
        )
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel("rating (400 points are odds of 10 to 1)")
        ax.grid(axis="y", visible=False)

    said = " ".join(_best(judge, found["ratings"]) for judge, found in judges.items())
    anchor = MODELS.get(battles["anchor"], battles["anchor"])
    return render(
        "ratings",
        "Ratings from all battles",
        f"{said} Bars are 95% intervals of the distance to {anchor}, which is 1000.",
        draw,
        (4.8, 1.1 + 0.3 * len(rows)),
    )


def _best(judge: str, rated: Mapping[str, Mapping[str, float]]) -> str:
    best = max(rated, key=lambda model: rated[model]["elo"])
    return f"By {JUDGES.get(judge, judge)}, {MODELS.get(best, best)} is rated highest."


def _short(judge: str) -> str:
    return JUDGES.get(judge, judge).removeprefix("the ")
