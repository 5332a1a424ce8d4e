"""Figures of the report: what is drawn, and the sentence that says what one sees.

Each figure is drawn twice from the same numbers, on a light and on a dark ground, as PNG.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from rayrlhf.evaluation.words import JUDGES, MODELS, STAGES, model_word

Records = Sequence[Mapping[str, Any]]
Draw = Callable[["Theme", Canvas], None]
Floats = npt.NDArray[np.float64]

_DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one ground; the series keep their hue on both."""

    ground: str
    text: str
    muted: str
    grid: str
    colours: Mapping[str, str]


LIGHT = Theme(
    "#ffffff",
    "#1d2430",
    "#667085",
    "#e4e7ec",
    {
        "base": "#8a93a3",
        "sft": "#2f6fd6",
        "ppo": "#d9541e",
        "ppo_ptx": "#b3261e",
        "human": "#1f9d74",
        "reward": "#2f6fd6",
        "vader": "#b7a33a",
        "faint": "#c3cfe2",
    },
)
DARK = Theme(
    "#161b24",
    "#e6eaf1",
    "#98a2b3",
    "#2b3341",
    {
        "base": "#9aa4b5",
        "sft": "#6ea1ff",
        "ppo": "#ff8a5c",
        "ppo_ptx": "#ff6b61",
        "human": "#4fd0a5",
        "reward": "#6ea1ff",
        "vader": "#dbc65a",
        "faint": "#3a4a66",
    },
)
THEMES = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its file name without ending, its words, and the PNG for each ground."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def figures(results: Mapping[str, Any], curves: Mapping[str, Records]) -> list[Figure]:
    """Draw every figure that the results and the metrics of the stages (by name) allow."""
    drawn = [
        _win_rates(results),
        _reward_against_kl(curves.get("ppo", ())),
        _reward_model(results),
        _calibration(results),
        _entropy(results),
    ]
    drawn += [_training(stage, curves.get(stage, ())) for stage in ("pretrain", "sft", "reward")]
    drawn.append(_ppo(curves.get("ppo", ())))
    return [figure for figure in drawn if figure is not None]


def _render(
    name: str, title: str, caption: str, draw: Draw, size: tuple[float, float] = (4.8, 3.0)
) -> Figure:
    pngs = {}
    for key, theme in THEMES.items():
        style: dict[Any, Any] = {
            "figure.facecolor": theme.ground,
            "axes.facecolor": theme.ground,
            "savefig.facecolor": theme.ground,
            "text.color": theme.text,
            "axes.labelcolor": theme.muted,
            "axes.edgecolor": theme.grid,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "grid.color": theme.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "font.size": 10,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "figure.dpi": _DPI,
        }
        with matplotlib.rc_context(style):
            canvas = Canvas(figsize=size, layout="constrained")
            draw(theme, canvas)
            buffer = io.BytesIO()
            FigureCanvasAgg(canvas).print_png(
                buffer, metadata={"Software": None}, pil_kwargs={"optimize": True}
            )
            pngs[key] = buffer.getvalue()
    return Figure(name, title, caption, pngs["light"], pngs["dark"])


def _series(records: Records, key: str) -> tuple[Floats, Floats]:
    """Return steps and values of the records that have a number at `key`."""
    kept = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _smooth(values: Floats) -> Floats:
    """Return the mean over a window of a fifteenth of the values around each of them."""
    half = max(0, len(values) // 30)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    starts, ends = np.maximum(0, at - half), np.minimum(len(values), at + half + 1)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _line(
    ax: Axes, theme: Theme, steps: Floats, values: Floats, colour: str, label: str | None = None
) -> None:
    ax.plot(steps, values, color=theme.colours["faint"], linewidth=0.8)
    ax.plot(steps, _smooth(values), color=theme.colours[colour], linewidth=1.8, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _win_rates(results: Mapping[str, Any]) -> Figure | None:
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
    return _render(
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


def _reward_against_kl(records: Records) -> Figure | None:
    kept = [
        r
        for r in records
        if r.get("reward/score_mean") is not None and r.get("kl/ref_per_response") is not None
    ]
    if len(kept) < 2:
        return None
    steps, scores = _series(kept, "reward/score_mean")
    _, kl = _series(kept, "kl/ref_per_response")

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        shades = LinearSegmentedColormap.from_list(
            "steps", [theme.colours["faint"], theme.colours["sft"], theme.colours["ppo"]]
        )
        ax.plot(_smooth(kl), _smooth(scores), color=theme.muted, linewidth=1, alpha=0.6)
        dots = ax.scatter(kl, scores, c=steps, cmap=shades, s=18, linewidths=0)
        bar = canvas.colorbar(dots, ax=ax, pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("PPO step")
        ax.set_xlabel("KL from the reference, nats per response")
        ax.set_ylabel("mean reward score")

    first, last = _ends(scores)
    return _render(
        "reward_against_kl",
        "Reward against KL",
        f"Over {len(kept)} PPO steps the mean reward goes from {first:.2f} to {last:.2f}, while "
        f"the policy's distance from where it started goes from {_ends(kl)[0]:.1f} to "
        f"{_ends(kl)[1]:.1f} nats per response. Each dot is a step: up is more reward, right is "
        "a policy that differs more.",
        draw,
    )


def _reward_model(results: Mapping[str, Any]) -> Figure | None:
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
    return _render(
        "reward_model",
        "Does the reward model agree with people?",
        "Of two held-out texts, the reward model picks the one that people rated "
        f"higher: {', '.join(said)}. The dashed line is guessing.",
        draw,
    )


def _calibration(results: Mapping[str, Any]) -> Figure | None:
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

    gap = float(np.average(predicted - observed, weights=counts))
    word = (
        "more certain than it should be"
        if gap > 2
        else ("less certain than it could be" if gap < -2 else "about as certain as it should be")
    )
    certain = np.average(predicted, weights=counts)
    right = np.average(observed, weights=counts)
    return _render(
        "calibration",
        "Does the reward model know when it is right?",
        f"On average it is {word}: it is {certain:.0f}% certain, and right "
        f"{right:.0f}% of the time. On the dashed line both are the same; larger "
        "dots are more pairs.",
        draw,
    )


def _entropy(results: Mapping[str, Any]) -> Figure | None:
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
    return _render(
        "entropy",
        "How many ways to go on does a model see?",
        f"{model_word(last)} is as unsure of its next token as between {few:.0f} "
        f"equally likely ones, {MODELS[first]} as between {many:.0f}: "
        f"{abs(100 * change):.0f}% {word} entropy. Low entropy means sure of itself, "
        "and in the end repetitive.",
        draw,
        (4.8, 0.9 + 0.42 * len(models)),
    )


def _training(stage: str, records: Records) -> Figure | None:
    steps, losses = _series(records, "loss")
    if len(steps) < 2:
        return None
    accuracy = [
        key for key in ("pair_accuracy", "eval/pair_accuracy") if len(_series(records, key)[0])
    ]
    held_out = sorted({key for r in records for key in r if key.startswith("eval/loss")})

    def draw(theme: Theme, canvas: Canvas) -> None:
        axes = canvas.subplots(1, 2 if accuracy else 1, squeeze=False)[0]
        axes[0].set_title("loss" if stage == "reward" else "loss, nats per token", color=theme.text)
        _line(axes[0], theme, steps, losses, "sft", "training")
        for key in held_out:
            at, values = _series(records, key)
            axes[0].plot(
                at,
                values,
                "o",
                markersize=3.5,
                color=theme.colours["ppo"],
                label="held out" if key == held_out[0] else None,
            )
        if held_out:
            axes[0].legend()
        for key in accuracy:
            at, values = _series(records, key)
            if key == "pair_accuracy":
                _line(axes[1], theme, at, 100 * values, "sft")
            else:
                axes[1].plot(at, 100 * values, "o", markersize=4, color=theme.colours["ppo"])
        if accuracy:
            axes[1].set_title("pairs in the right order, %", color=theme.text)
        for ax in axes:
            ax.set_xlabel("step")

    said = (
        f"The loss goes from {_ends(losses)[0]:.2f} to {_ends(losses)[1]:.2f} in "
        f"{int(steps[-1])} steps"
    )
    if accuracy:
        first, last = _ends(_series(records, accuracy[0])[1])
        said += f", and pairs in the right order from {100 * first:.0f}% to {100 * last:.0f}%"
    return _render(
        f"training_{stage}",
        STAGES[stage],
        f"{said}. The strong line is the running mean"
        + ("; orange dots are held-out data." if held_out else "."),
        draw,
    )


def _ppo(records: Records) -> Figure | None:
    panels = {
        "reward/score_mean": "reward score",
        "kl/ref_per_response": "KL, nats per response",
        "policy/entropy": "entropy, nats per token",
        "rollout/response_length": "response length, tokens",
    }
    found = {key: _series(records, key) for key in panels}
    found = {key: series for key, series in found.items() if len(series[0]) > 1}
    if not found:
        return None

    def draw(theme: Theme, canvas: Canvas) -> None:
        rows = (len(found) + 1) // 2
        axes = canvas.subplots(rows, min(2, len(found)), sharex=True, squeeze=False).ravel()
        for ax, (key, (steps, values)) in zip(axes, found.items(), strict=False):
            _line(ax, theme, steps, values, "ppo")
            ax.set_title(panels[key], color=theme.text, fontsize=9)
        for ax in axes[len(found) :]:
            ax.set_visible(False)

    said = [
        f"{panels[key]} from {_ends(values)[0]:.2f} to {_ends(values)[1]:.2f}"
        for key, (_, values) in found.items()
    ]
    return _render(
        "ppo",
        STAGES["ppo"],
        f"From the first to the last PPO step: {'; '.join(said)}.",
        draw,
        (4.8, 3.8),
    )


def _ends(values: Floats) -> tuple[float, float]:
    """Return the means of the first and of the last tenth of the values."""
    part = max(1, len(values) // 10)
    return float(values[:part].mean()), float(values[-part:].mean())
