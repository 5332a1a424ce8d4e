"""Figure of where the reward model is right: by how clear the case is, and by length."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import Figure, Theme, render

_PANELS = {
    "by_rating_gap": "gap of the ratings",
    "by_length": "longer response, tokens",
}
_LINES = {
    "human_pair_accuracy": ("human", "one human rater"),
    "pair_accuracy": ("reward", "reward model"),
}


def reward_errors(results: Mapping[str, Any]) -> Figure | None:
    """Draw the accuracy over fifths of the pairs of all sources."""
    pooled = results["reward_model_pooled"]
    panels = {key: bins for key in _PANELS if len(bins := pooled.get(key, ())) > 1}
    if not panels:
        return None

    def draw(theme: Theme, canvas: Canvas) -> None:
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (panel, bins) in zip(axes, panels.items(), strict=True):
            for key, (colour, label) in _LINES.items():
                known = [b for b in bins if b[key] is not None]
                ax.plot(
                    [b["mean"] for b in known],
                    [100 * b[key] for b in known],
                    "o-",
                    color=theme.colours[colour],
                    linewidth=1.6,
                    markersize=4,
                    label=label if known else None,
                )
            ax.axhline(50, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_xlabel(_PANELS[panel])
        axes[0].set_ylabel("pairs in people's order, %")
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside upper center", ncols=2)

    said = [
        f"{_share(bins[0])} of the pairs {low} and {_share(bins[-1])} of those {high}"
        for bins, low, high in (
            (panels.get("by_rating_gap"), "that people rated almost alike", "far apart"),
            (panels.get("by_length"), "of short responses", "with a long one"),
        )
        if bins
    ]
    return render(
        "reward_errors",
        "Where is the reward model right?",
        f"It orders {'; '.join(said)} as people did. Each dot is a fifth of the pairs.",
        draw,
        (4.8, 2.9),
    )


def _share(fifth: Mapping[str, Any]) -> str:
    return f"{100 * fifth['pair_accuracy']:.0f}%"
