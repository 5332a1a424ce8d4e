"""Figures that compare the models of a run: entropy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import Figure, Theme, render
from rayrlhf.evaluation.words import MODELS, model_word


def entropy(results: Mapping[str, Any]) -> Figure | None:
    entropy = results["entropy_nats_per_token"]
    models = [model for model in MODELS if model in entropy]
    if len(models) < 2:
        return None

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        for y, model in enumerate(reversed(models)):
            ax.barh(y, entropy[model], 0.6, color=theme.colours.get(model, theme.colours["human"]))
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
