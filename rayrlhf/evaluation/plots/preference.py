"""The figure of InstructGPT (arXiv:2203.02155, figures 1 and 3): win rates against SFT."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.few_shot import MODEL
from rayrlhf.evaluation.plots.canvas import Figure, Theme, render
from rayrlhf.evaluation.words import JUDGES, MODELS, model_word

Rate = tuple[float, Sequence[float]]
"""A win rate and the bounds of its interval."""
_JUDGE_COLOURS = ("vader", "reward", "human", "dpo", "ppo", "base")
_MARKERS = "osD^vP"


def win_rates(results: Mapping[str, Any]) -> Figure | None:
    """Draw every model's win rate against the reference, by each judge; None with one model."""
    reference = results["reference"]
    rows = _rows(results)
    if len(rows) < 2:
        return None
    judges = list(dict.fromkeys(judge for rates in rows.values() for judge in rates))

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        for number, judge in enumerate(judges):
            colour = theme.colours[_JUDGE_COLOURS[number % len(_JUDGE_COLOURS)]]
            shift = 0.13 * (number - (len(judges) - 1) / 2)
            for x, (model, rates) in enumerate(rows.items()):
                if model == reference or judge not in rates:
                    continue
                rate, (low, high) = rates[judge]
                ax.plot([x + shift] * 2, [100 * low, 100 * high], color=colour, linewidth=2)
                ax.plot(
                    x + shift,
                    100 * rate,
                    _MARKERS[number % len(_MARKERS)],
                    color=colour,
                    markersize=6,
                )
            ax.plot([], [], _MARKERS[number % len(_MARKERS)], color=colour, label=_judge(judge))
        ax.axhline(50, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xticks(range(len(rows)), [word(model).replace(" ", "\n") for model in rows])
        ax.set_xlim(-0.5, len(rows) - 0.5)
        ax.set_ylim(0, 100)
        ax.set_ylabel(f"preferred to {MODELS[reference]}, %")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2)
        ax.grid(axis="x", visible=False)

    trained = [model for model in MODELS if model in rows and model != reference]
    others = [model for model in rows if model != reference]
    best = trained[-1] if trained else others[-1]
    said = " ".join(
        _verdict(best, reference, judge, rate, bounds)
        for judge, (rate, bounds) in rows[best].items()
    )
    few_shot = results["few_shot"]
    if few_shot is not None:
        said += (
            f" {word(few_shot['model'])} had {few_shot['mean_demonstrations']:.1f} demonstrations "
            "before each prompt, on average."
        )
    return render(
        "win_rate",
        f"Preferred to {model_word(reference)}",
        f"{said} Bars are 95% intervals; the dashed line is {MODELS[reference]} itself.",
        draw,
        (4.8, 3.4),
    )


def word(model: str) -> str:
    """Return what a model is called in the figure, the prompted one included."""
    if model == MODEL:
        return "Base few-shot"
    return model_word(model) if model in MODELS else model


def _judge(judge: str) -> str:
    return JUDGES.get(judge, judge)


def _rows(results: Mapping[str, Any]) -> dict[str, dict[str, Rate]]:
    """Return win rates by model and judge, in the order of the training, the prompted base second.

    Models that no stage of the run made come last.
    """
    reference = results["reference"]
    key = f"win_rate_vs_{reference}"
    bounds = results["intervals"][key]
    found = {
        model: {judge: (rate, bounds[model][judge]) for judge, rate in rates.items()}
        for model, rates in results[key].items()
    }
    for model, rates in _outside(results, reference).items():
        found[model] = {**rates, **found.get(model, {})}
    few_shot = results["few_shot"]
    if few_shot is not None:
        found[few_shot["model"]] = {
            judge: (rate["value"], (rate["low"], rate["high"]))
            for judge, rate in few_shot["win_rate"].items()
        }
    order = ["base", MODEL, "sft", "ppo", "ppo_ptx", "dpo"]
    return {
        model: found[model]
        for model in sorted(found, key=lambda m: order.index(m) if m in order else len(order))
    }


def _outside(results: Mapping[str, Any], reference: str) -> dict[str, dict[str, Rate]]:
    """Return the win rates of the battles: of models from outside the run, by all judges."""
    found: dict[str, dict[str, Rate]] = {}
    for judge, table in results.get("battles", {}).get("judges", {}).items():
        for model, rates in table["win_rate"].items():
            if reference in rates:
                bounds = table["win_rate_interval"][model][reference]
                found.setdefault(model, {})[judge] = (rates[reference], bounds)
    return found


def _verdict(model: str, reference: str, judge: str, rate: float, bounds: Sequence[float]) -> str:
    said = (
        f"{word(model)} is preferred to {model_word(reference)} on {100 * rate:.0f}% of "
        f"the prompts by {_judge(judge)} (95% interval {100 * bounds[0]:.0f} to "
        f"{100 * bounds[1]:.0f}%)"
    )
    if bounds[0] <= 0.5 <= bounds[1]:
        return f"{said}, which is not clearly different from a draw."
    return f"{said}."
