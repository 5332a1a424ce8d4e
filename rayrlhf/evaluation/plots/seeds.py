"""Figures over several seeds: InstructGPT's, and the frontiers of proxy and gold reward."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.few_shot import MODEL
from rayrlhf.evaluation.plots.canvas import Figure, Theme, render
from rayrlhf.evaluation.plots.overoptimisation import CURVES
from rayrlhf.evaluation.plots.preference import word
from rayrlhf.evaluation.words import JUDGES, MODELS, model_word

if TYPE_CHECKING:
    from rayrlhf.evaluation.seeds import OverSeeds

Runs = Sequence[Mapping[str, Any]]
ORDER = ("base", MODEL, "sft", "dpo", "ppo", "ppo_ptx")
_COLOURS = {"vader": "vader", "reward": "reward"}


def figures(runs: Runs, found: Mapping[tuple[str, str], "OverSeeds"]) -> list[Figure]:
    """Draw what the runs have the numbers for."""
    drawn = [_win_rates(runs, found), _frontiers(runs)]
    return [figure for figure in drawn if figure is not None]


def _win_rates(runs: Runs, found: Mapping[tuple[str, str], "OverSeeds"]) -> Figure | None:
    """Draw the mean over seeds with its interval, and each seed's rate as a faint dot."""
    reference = runs[0]["reference"]
    rates = {
        judge: {
            of: row
            for (name, of), row in found.items()
            if name == f"win rate against {MODELS[reference]}, {JUDGES[judge]}"
        }
        for judge in runs[0]["judges"]
    }
    present = {model for rows in rates.values() for model in rows} | {reference}
    models = [model for model in ORDER if model in present]
    if len(models) < 2:
        return None

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        for number, (judge, rows) in enumerate(rates.items()):
            colour = theme.colours[_COLOURS.get(judge, "human")]
            shift = 0.16 * (number - (len(rates) - 1) / 2)
            for x, model in enumerate(models):
                row = rows.get(model)
                if row is None:
                    continue
                at = [x + shift] * len(row.by_seed)
                ax.plot(at, [100 * rate for rate in row.by_seed.values()], "o", color=colour,
                        alpha=0.35, markersize=4)  # fmt: skip
                if row.bounds is not None:
                    low, high = (min(100.0, max(0.0, 100 * bound)) for bound in row.bounds)
                    ax.plot([x + shift] * 2, [low, high], color=colour, linewidth=2)
                ax.plot(x + shift, 100 * row.mean, "so"[number % 2], color=colour, markersize=7)
            ax.plot([], [], "so"[number % 2], color=colour, label=JUDGES[judge])
        ax.axhline(50, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xticks(range(len(models)), [word(model).replace(" ", "\n") for model in models])
        ax.set_xlim(-0.5, len(models) - 0.5)
        ax.set_ylim(0, 100)
        ax.set_ylabel(f"preferred to {MODELS[reference]}, %")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        ax.grid(axis="x", visible=False)

    num_seeds = len({results["seed"] for results in runs})
    return render(
        "win_rate_seeds",
        f"Preferred to {model_word(reference)}, {num_seeds} seeds",
        "Means over the seeds, whose own rates are the faint dots; bars are 95% intervals of the "
        f"mean. The dashed line is {MODELS[reference]} itself.",
        draw,
        (4.8, 3.4),
    )


def _frontiers(runs: Runs) -> Figure | None:
    """Draw proxy and gold reward over sqrt(KL) of every run that has them."""
    measured = [results for results in runs if results.get("overoptimisation")]
    if len({results["seed"] for results in measured}) < 2:
        return None
    curves = [
        (key, CURVES[key] if model is None else MODELS[model], model)
        for key, model in (("best_of_n", None), ("ppo", "ppo"), ("ppo", "ppo_ptx"))
        if any(
            results["overoptimisation"][key] and (model is None or model in results["models"])
            for results in measured
        )
    ]

    def draw(theme: Theme, canvas: Canvas) -> None:
        panels = canvas.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for ax, (key, title, model) in zip(panels, curves, strict=True):
            seen: set[int] = set()
            for results in measured:
                own = model is None or model in results["models"]
                if own and results["seed"] not in seen and results["overoptimisation"][key]:
                    seen.add(results["seed"])
                    _frontier(ax, theme, results["overoptimisation"][key], label=len(seen) == 1)
            ax.set_title(title, color=theme.text, fontsize=9)
            ax.set_xlabel("√KL (KL in nats)")
        panels[0].set_ylabel("reward, SDs of the reference")
        panels[0].legend(loc="upper left")

    return render(
        "overoptimisation_seeds",
        "Proxy and gold reward, one line per seed",
        " ".join(_said(measured, key, title, model) for key, title, model in curves)
        + " Rings mark where each gold reward peaks.",
        draw,
        (4.8, 3.2),
    )


def _frontier(ax: Axes, theme: Theme, curve: Mapping[str, Any], *, label: bool) -> None:
    points = sorted(curve["points"], key=lambda point: point["kl"])
    x = np.sqrt(np.maximum(0.0, [0.0, *(point["kl"] for point in points)]))
    for name, colour, style in (("proxy", "reward", "--"), ("gold", "vader", "-")):
        y = [0.0, *(point[name] for point in points)]
        ax.plot(x, y, style, color=theme.colours[colour], linewidth=1.4,
                label=name if label else None)  # fmt: skip
    peak = curve["peak"]
    ax.plot(max(0.0, peak["kl"]) ** 0.5, peak["gold"], "o", markersize=8, markerfacecolor="none",
            markeredgecolor=theme.colours["ppo"], markeredgewidth=1.5)  # fmt: skip


def _said(measured: Runs, key: str, title: str, model: str | None) -> str:
    by_seed = {
        results["seed"]: results["overoptimisation"][key]
        for results in reversed(measured)
        if results["overoptimisation"][key] and (model is None or model in results["models"])
    }
    falls = sum(not curve["peak"]["is_last"] for curve in by_seed.values())
    name = title[0].upper() + title[1:]
    last = [curve["points"][-1] for curve in by_seed.values()]
    gold = np.mean([point["gold"] for point in last])
    proxy = np.mean([point["proxy"] for point in last])
    return (
        f"{name} ends at {proxy:+.2f} by the proxy and {gold:+.2f} by the gold reward, on average; "
        f"the gold reward peaks before the end in {falls} of {len(by_seed)} seeds."
    )
