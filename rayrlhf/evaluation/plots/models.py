"""Figures that compare the models of a run: win rates, entropy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import Figure, Theme, render
from rayrlhf.evaluation.words import JUDGES, MODELS, model_word


def win_rates(results: Mapping[str, Any]) -> Figure | None:
    reference = results["reference"]
    rates = {
        model: judges
        for model, judges in results[f"win_rate_vs_{reference}"].items()
        if model != reference
    }
    if not rates:
        return None
    bounds = results["intervals"][f"win_rate_vs_{reference}"]
    rows = [(model, judge) for model in MODELS if model in rates for judge in rates[model]]

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        for y, (model, judge) in enumerate(reversed(rows)):
            low, high = bounds[model][judge]
            rate, colour = rates[model][judge], theme.colours[model]
            ax.plot(
                [100 * low, 100 * high],
                [y, y],
                color=colour,
                linewidth=3,
                alpha=0.45,
                solid_capstyle="round",
            )
            ax.plot(100 * rate, y, "o", color=colour, markersize=8)
            ax.annotate(
                f"{100 * rate:.0f}%",
                (100 * rate, y),
                xytext=(0, 8),
                ha="center",
                textcoords="offset points",
                color=theme.text,
                fontsize=9,
            )
        ax.axvline(50, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_yticks(
            range(len(rows)), [f"{model_word(m)}, by {JUDGES[j]}" for m, j in reversed(rows)]
        )
        ax.set_ylim(-0.6, len(rows) - 0.2)
        ax.set_xlim(0, 100)
        ax.set_xlabel(f"prompts won against {model_word(reference)}, % (ties half)")
        ax.grid(axis="y", visible=False)

    best = max((m for m in rates), key=list(MODELS).index)
    said = " ".join(
        _verdict(best, reference, judge, rates[best][judge], bounds[best][judge])
        for judge in rates[best]
    )
    return render(
        "win_rate",
        f"Preferred to {model_word(reference)}",
        f"{said} Bars are 95% intervals; the dashed line is a draw.",
        draw,
        (4.8, 1.2 + 0.42 * len(rows)),
    )


def _verdict(model: str, reference: str, judge: str, rate: float, bounds: Sequence[float]) -> str:
    said = (
        f"{model_word(model)} is preferred to {model_word(reference)} on {100 * rate:.0f}% of "
        f"the prompts by {JUDGES[judge]} (95% interval {100 * bounds[0]:.0f} to "
        f"{100 * bounds[1]:.0f}%)"
    )
    if bounds[0] <= 0.5 <= bounds[1]:
        return f"{said}, which is not clearly different from a draw."
    return f"{said}."


def entropy(results: Mapping[str, Any]) -> Figure | None:
    entropy = results["entropy_nats_per_token"]
    models = [model for model in MODELS if model in entropy]
    if len(models) < 2:
        return None

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        for y, model in enumerate(reversed(models)):
            ax.barh(y, entropy[model], 0.6, color=theme.colours[model])
            ax.annotate(
                f"{entropy[model]:.2f}",
                (entropy[model], y),
                xytext=(4, 0),
                va="center",
                textcoords="offset points",
                fontsize=9,
                color=theme.text,
            )
        ax.set_yticks(range(len(models)), [model_word(m) for m in reversed(models)])
        ax.set_xlim(0, 1.15 * max(entropy[m] for m in models))
        ax.set_xlabel("entropy of the next token, nats")
        ax.grid(axis="y", visible=False)

    first, last = models[0], models[-1]
    many, few = np.exp(entropy[first]), np.exp(entropy[last])
    change = entropy[last] / entropy[first] - 1 if entropy[first] else 0.0
    word = "less" if change < 0 else "more"
    return render(
        "entropy",
        "How many ways to go on does a model see?",
        f"{model_word(last)} is as unsure of its next token as between {few:.0f} "
        f"equally likely ones, {MODELS[first]} as between {many:.0f}: "
        f"{abs(100 * change):.0f}% {word} entropy. Low entropy means sure of itself, "
        "and in the end repetitive.",
        draw,
        (4.8, 0.9 + 0.42 * len(models)),
    )
