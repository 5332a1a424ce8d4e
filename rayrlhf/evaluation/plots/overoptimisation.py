"""Proxy and gold reward over sqrt(KL) (arXiv:2210.10760, figures 1 and 2)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import Figure, Theme, render

CURVES = {"best_of_n": "best of n", "ppo": "PPO"}
_COLOURS = {"proxy": "reward", "gold": "vader"}


def overoptimisation(results: Mapping[str, Any]) -> Figure | None:
    """Draw one panel per way to optimise; None without a gold reward model."""
    found = results["overoptimisation"]
    if found is None:
        return None
    curves = {key: found[key] for key in CURVES if found[key] is not None}

    def draw(theme: Theme, canvas: Canvas) -> None:
        panels = canvas.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for ax, (key, curve) in zip(panels, curves.items(), strict=True):
            _panel(ax, theme, curve)
            ax.set_title(CURVES[key], color=theme.text, fontsize=9)
            ax.set_xlabel("√KL (KL in nats)")
        panels[0].set_ylabel("reward, SDs of the reference")
        panels[0].legend(loc="upper left")

    return render(
        "overoptimisation",
        "Proxy and gold reward",
        " ".join(_sentence(CURVES[key], curve) for key, curve in curves.items())
        + " Bands are 95% intervals; the ring marks where the gold reward peaks.",
        draw,
        (4.8, 3.2),
    )


def _panel(ax: Axes, theme: Theme, curve: Mapping[str, Any]) -> None:
    points = sorted(curve["points"], key=lambda point: point["kl"])
    start = [] if points[0]["kl"] <= 0 else [0.0]  # the reference itself
    x = np.sqrt(np.maximum(0.0, [*start, *(point["kl"] for point in points)]))
    for name, colour in _COLOURS.items():
        y = [*start, *(point[name] for point in points)]
        bounds = [[0.0, 0.0]] * len(start) + [point[f"{name}_interval"] for point in points]
        low, high = zip(*bounds, strict=True)
        ax.fill_between(x, low, high, color=theme.colours[colour], alpha=0.2, linewidth=0)
        ax.plot(
            x,
            y,
            "--" if name == "proxy" else "-",
            marker="o",
            markersize=3.5,
            color=theme.colours[colour],
            label=name,
        )
    peak = curve["peak"]
    ax.plot(
        max(0.0, peak["kl"]) ** 0.5,
        peak["gold"],
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=theme.colours["ppo"],
        markeredgewidth=1.8,
    )


def _sentence(word: str, curve: Mapping[str, Any]) -> str:
    peak = curve["peak"]
    last = curve["points"][-1]
    where = f"n = {peak['n']}" if "n" in peak else f"step {peak['step']}"
    said = (
        f"With {word} the proxy ends at {last['proxy']:+.2f} and the gold reward at "
        f"{last['gold']:+.2f}"
    )
    if peak["is_last"]:
        distance = max(0.0, last["kl"]) ** 0.5
        return f"{said}, its highest: no over-optimisation up to √KL {distance:.1f}."
    low, high = peak["fall_interval"]
    sure = "" if low > 0 else ", which may be chance"
    return (
        f"{said}, {peak['fall']:.2f} (95% interval {low:.2f} to {high:.2f}) below its peak at "
        f"{where}{sure}."
    )
