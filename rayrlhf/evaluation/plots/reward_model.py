"""Figures of the reward model: agreement with people, calibration."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import Figure, Theme, render


def reward_model(results: Mapping[str, Any]) -> Figure | None:
    table = results["reward_model"]
    if not table:
        return None
    sources = list(table)
    keys = {
        "human_pair_accuracy": ("human", "one human rater"),
        "pair_accuracy": ("reward", "reward model"),
        "vader_pair_accuracy": ("vader", "VADER's rules"),
    }
    keys = {
        key: look
        for key, look in keys.items()
        if any(table[s].get(key) is not None for s in sources)
    }

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        width = 0.8 / len(keys)
        for k, (key, (colour, label)) in enumerate(keys.items()):
            x = np.arange(len(sources)) - 0.4 + width * (k + 0.5)
            shares = [100 * (table[s].get(key) or 0.0) for s in sources]
            ax.bar(
                x,
                [share - 50 if share else 0 for share in shares],
                width * 0.92,
                bottom=50,
                color=theme.colours[colour],
                label=label,
            )
            for at, share in zip(x, shares, strict=True):
                if share:
                    ax.text(
                        at,
                        max(share, 50) + 0.8,
                        f"{share:.0f}",
                        ha="center",
                        fontsize=8,
                        color=theme.text,
                    )
        ax.axhline(50, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xticks(range(len(sources)), sources)
        ax.set_ylim(
            min(45.0, *(100 * (table[s].get(k) or 0.5) - 3 for s in sources for k in keys)), 100
        )
        ax.set_ylabel("pairs in people's order, %")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.2)
        ax.grid(axis="x", visible=False)

    said = []
    for source in sources:
        row = table[source]
        human = row.get("human_pair_accuracy")
        said.append(
            f"{100 * row['pair_accuracy']:.0f}% on {source}"
            + (f" (one person: {100 * human:.0f}%)" if human is not None else "")
        )
    return render(
        "reward_model",
        "Does the reward model agree with people?",
        "Of two held-out texts, the reward model picks the one that people rated "
        f"higher: {', '.join(said)}. The dashed line is guessing.",
        draw,
    )


def calibration(results: Mapping[str, Any]) -> Figure | None:
    bins = results["reward_model_calibration"]
    if len(bins) < 2:
        return None
    predicted = np.array([100 * b["predicted"] for b in bins])
    observed = np.array([100 * b["observed"] for b in bins])
    counts = np.array([b["num_pairs"] for b in bins], dtype=np.float64)

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        ax.plot([50, 100], [50, 100], color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        ax.plot(predicted, observed, color=theme.colours["reward"], linewidth=1.6)
        ax.scatter(
            predicted,
            observed,
            s=20 + 160 * counts / counts.max(),
            color=theme.colours["reward"],
            linewidths=0,
        )
        ax.set_xlim(48, 102)
        ax.set_ylim(min(48.0, observed.min() - 4), 104)
        ax.set_xlabel("certainty of the reward model, %")
        ax.set_ylabel("it was right, %")

    error = results["reward_model_pooled"]["calibration_error"]
    gap = float(np.average(predicted - observed, weights=counts))
    word = (
        "more certain than it should be"
        if gap > 2
        else ("less certain than it could be" if gap < -2 else "about as certain as it should be")
    )
    certain = np.average(predicted, weights=counts)
    right = np.average(observed, weights=counts)
    return render(
        "calibration",
        "Does the reward model know when it is right?",
        f"On average it is {word}: it is {certain:.0f}% certain, and right "
        f"{right:.0f}% of the time; the expected calibration error is {100 * error:.1f} points. "
        "On the dashed line both are the same; larger "
        "dots are more pairs.",
        draw,
    )
