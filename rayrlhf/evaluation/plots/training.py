"""Figures from metrics.jsonl: losses, accuracy, PPO's curves, reward against KL."""

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas

from rayrlhf.evaluation.plots.canvas import (
    Figure,
    Records,
    Theme,
    ends,
    line,
    render,
    series,
    smooth,
)
from rayrlhf.evaluation.words import STAGES


def training(stage: str, records: Records) -> Figure | None:
    steps, losses = series(records, "loss")
    if len(steps) < 2:
        return None
    accuracy = [
        key for key in ("pair_accuracy", "eval/pair_accuracy") if len(series(records, key)[0])
    ]
    held_out = sorted({key for r in records for key in r if key.startswith("eval/loss")})

    def draw(theme: Theme, canvas: Canvas) -> None:
        axes = canvas.subplots(1, 2 if accuracy else 1, squeeze=False)[0]
        unit = "" if stage in ("reward", "dpo") else ", nats per token"
        axes[0].set_title(f"loss{unit}", color=theme.text)
        line(axes[0], theme, steps, losses, "sft", "training")
        for key in held_out:
            at, values = series(records, key)
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
            at, values = series(records, key)
            if key == "pair_accuracy":
                line(axes[1], theme, at, 100 * values, "sft")
            else:
                axes[1].plot(at, 100 * values, "o", markersize=4, color=theme.colours["ppo"])
        if accuracy:
            axes[1].set_title("pairs in the right order, %", color=theme.text)
        for ax in axes:
            ax.set_xlabel("step")

    said = (
        f"The loss goes from {ends(losses)[0]:.2f} to {ends(losses)[1]:.2f} in "
        f"{int(steps[-1])} steps"
    )
    if accuracy:
        first, last = ends(series(records, accuracy[0])[1])
        said += f", and pairs in the right order from {100 * first:.0f}% to {100 * last:.0f}%"
    return render(
        f"training_{stage}",
        STAGES[stage],
        f"{said}. The strong line is the running mean"
        + ("; orange dots are held-out data." if held_out else "."),
        draw,
    )


def ppo(records: Records) -> Figure | None:
    panels = {
        "reward/score_mean": "reward score",
        "kl/ref_per_response": "KL, nats per response",
        "policy/entropy": "entropy, nats per token",
        "rollout/response_length": "response length, tokens",
    }
    found = {key: series(records, key) for key in panels}
    found = {key: series for key, series in found.items() if len(series[0]) > 1}
    if not found:
        return None

    def draw(theme: Theme, canvas: Canvas) -> None:
        rows = (len(found) + 1) // 2
        axes = canvas.subplots(rows, min(2, len(found)), sharex=True, squeeze=False).ravel()
        for ax, (key, (steps, values)) in zip(axes, found.items(), strict=False):
            line(ax, theme, steps, values, "ppo")
            ax.set_title(panels[key], color=theme.text, fontsize=9)
        for ax in axes[len(found) :]:
            ax.set_visible(False)

    said = [
        f"{panels[key]} from {ends(values)[0]:.2f} to {ends(values)[1]:.2f}"
        for key, (_, values) in found.items()
    ]
    return render(
        "ppo",
        STAGES["ppo"],
        f"From the first to the last PPO step: {'; '.join(said)}.",
        draw,
        (4.8, 3.8),
    )


def reward_against_kl(records: Records) -> Figure | None:
    kept = [
        r
        for r in records
        if r.get("reward/score_mean") is not None and r.get("kl/ref_per_response") is not None
    ]
    if len(kept) < 2:
        return None
    steps, scores = series(kept, "reward/score_mean")
    _, kl = series(kept, "kl/ref_per_response")

    def draw(theme: Theme, canvas: Canvas) -> None:
        ax = canvas.subplots()
        shades = LinearSegmentedColormap.from_list(
            "steps", [theme.colours["faint"], theme.colours["sft"], theme.colours["ppo"]]
        )
        ax.plot(smooth(kl), smooth(scores), color=theme.muted, linewidth=1, alpha=0.6)
        dots = ax.scatter(kl, scores, c=steps, cmap=shades, s=18, linewidths=0)
        bar = canvas.colorbar(dots, ax=ax, pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("PPO step")
        ax.set_xlabel("KL from the reference, nats per response")
        ax.set_ylabel("mean reward score")

    first, last = ends(scores)
    return render(
        "reward_against_kl",
        "Reward against KL",
        f"Over {len(kept)} PPO steps the mean reward goes from {first:.2f} to {last:.2f}, while "
        f"the policy's distance from where it started goes from {ends(kl)[0]:.1f} to "
        f"{ends(kl)[1]:.1f} nats per response. Each dot is a step: up is more reward, right is "
        "a policy that differs more.",
        draw,
    )
