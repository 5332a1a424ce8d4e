"""The report's sections on what RLHF costs: variety, held-out loss, gold reward, hacked answers."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rayrlhf.evaluation.cells import number, table
from rayrlhf.evaluation.plots.overoptimisation import CURVES
from rayrlhf.evaluation.words import JUDGES, MODELS, model_word

Results = Mapping[str, Any]

VARIETY = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "self_bleu": "self-BLEU",
    "distinct_answers": "different answers",
    "self_bleu_one_prompt": "self-BLEU, one prompt",
}


def variety_section(results: Results) -> str:
    """Return the table of entropy and variety, one row per model."""
    measures = [key for key in VARIETY if any(key in row for row in results["variety"].values())]
    samples = results["variety_samples"]
    rows = []
    for model in _ordered(results["variety"]):
        nats = results["entropy_nats_per_token"].get(model)
        low, high = results["entropy_intervals"].get(model, (0.0, 0.0))
        cells = [
            f"<b>{escape(MODELS.get(model, model))}</b>",
            number(nats, more=f"{low:.2f} to {high:.2f}"),
        ]
        for key in measures:
            found = results["variety"][model].get(key)
            digits = 1 if key == "distinct_answers" else 2
            cells.append(
                number(
                    found["value"],
                    digits,
                    more=f"{found['low']:.{digits}f} to {found['high']:.{digits}f}",
                )
                if found
                else number(None)
            )
        rows.append(cells)
    many = (
        f" Different answers are out of {samples} to one prompt, the mean over some prompts."
        if samples
        else ""
    )
    return (
        "<section><h2>Variety</h2>"
        + table(
            ["model", "entropy, nats", *[VARIETY[key] for key in measures]],
            rows,
            "How varied each model's answers to the same prompts are",
        )
        + '<p class="note">The small figures are 95% intervals over prompts. Self-BLEU is high '
        "where answers share their wording; all else is high where they differ."
        f"{many}</p></section>"
    )


def tax_section(results: Results) -> str:
    """Return the held-out loss by source, with the increase against the base model."""
    losses = results["held_out_loss"]
    sources = list(dict.fromkeys(source for row in losses.values() for source in row))
    if not sources:
        return ""
    tax = results["alignment_tax"]
    rows = [
        [
            f"<b>{escape(MODELS[model])}</b>",
            *[
                number(
                    losses[model].get(source),
                    3,
                    more=f"{tax[model][source]:+.3f}" if source in tax.get(model, {}) else "",
                )
                for source in sources
            ],
        ]
        for model in _ordered(losses)
    ]
    return (
        "<section><h2>Alignment tax</h2>"
        + table(["model", *sources], rows, "Held-out loss by source, nats per token")
        + '<p class="note">Lower is better; the small figure is the increase against the base '
        "model. Fine-tuning and PPO usually cost some of it: that price is the alignment "
        "tax.</p></section>"
    )


def overoptimisation_section(results: Results) -> str:
    """Return the points of the figure as tables; empty without a gold reward model."""
    found = results["overoptimisation"]
    if found is None:
        return ""
    tables = []
    for key, name in CURVES.items():
        if found[key] is None:
            continue
        label = "n" if key == "best_of_n" else "step"
        peak = found[key]["peak"][label]
        rows = [
            [
                f"{'<b>' if point[label] == peak else ''}{point[label]}"
                f"{' (peak)</b>' if point[label] == peak else ''}",
                number(point["kl"]),
                *[
                    number(
                        point[reward], more="{:.2f} to {:.2f}".format(*point[f"{reward}_interval"])
                    )
                    for reward in ("proxy", "gold")
                ],
            ]
            for point in found[key]["points"]
        ]
        caption = f"Proxy and gold reward with {name}"
        tables.append(table([label, "KL, nats", "proxy reward", "gold reward"], rows, caption))
    return (
        "<section><h2>Over-optimisation</h2>"
        '<p class="note">The proxy is the reward model that is maximised; the gold one learned '
        "from comparisons that have no text in common with the proxy's. Rewards are in standard "
        f"deviations of the reference's answers, on {found['num_prompts']} prompts.</p>"
        f"{''.join(tables)}</section>"
    )


def hacking_section(results: Results) -> str:
    """Return what the rules mark, and the answers to look at: largest gains, and marked ones."""
    found = results["hacking"]
    rules = found["rules"]
    rows = [
        [
            f"<b>{escape(MODELS.get(model, model))}</b>",
            *[
                number(found["shares"][model][rule], 1, scale=100, unit="%")
                for rule in (*rules, "any")
            ],
        ]
        for model in _ordered(found["shares"])
    ]
    meaning = "; ".join(f"{rule}: {text}" for rule, text in rules.items())
    trained = MODELS[found["trained"]]
    judge = JUDGES[found["judge"]]
    reference = MODELS[results["reference"]]
    shown = "".join(
        _cards(title, found[key], reference)
        for title, key in (
            (f"Largest gains of {trained} by {judge}", "gains"),
            (f"Answers of {trained} that a rule marks", "marked"),
        )
    )
    return (
        "<section><h2>What looks hacked</h2>"
        + table(["model", *rules, "any rule"], rows, "Share of the answers that each rule marks")
        + f'<p class="note">A rule marks, it proves nothing: compare with {escape(reference)}, '
        f"which no reward shaped. {escape(meaning[0].upper() + meaning[1:])}.</p>{shown}</section>"
    )


def _cards(title: str, samples: Sequence[Mapping[str, Any]], reference: str) -> str:
    if not samples:
        return ""
    cards = "".join(
        answer_card(
            sample,
            f"score {sample['gain']:+.2f} against {reference}"
            + (f"; marked: {', '.join(sample['rules'])}" if sample["rules"] else ""),
        )
        for sample in samples
    )
    return (
        f'<details class="card"><summary>{escape(title)}</summary>'
        f'<div class="cards">{cards}</div></details>'
    )


def answer_card(sample: Mapping[str, Any], note: str = "") -> str:
    """Return a prompt with every model's answer and the judges' scores, side by side."""
    answers = []
    for model, answer in sample["answers"].items():
        scores = " · ".join(
            f"{JUDGES[judge].removeprefix('the ')} {score:+.2f}"
            for judge, score in answer["scores"].items()
        )
        cut = "" if answer["ended"] else ' <span class="muted" title="cut off">…</span>'
        trained = " trained" if model not in ("base", "sft") else ""
        answers.append(
            f'<div class="answer{trained}"><div class="who">'
            f"{escape(model_word(model))}</div><p>{escape(answer['text'].strip())}"
            f'{cut}</p><div class="scores">{escape(scores)}</div></div>'
        )
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<article class="card sample"><p class="prompt">{escape(sample["prompt"])}'
        f'</p>{said}<div class="answers">{"".join(answers)}</div></article>'
    )


def _ordered(models: Iterable[str]) -> list[str]:
    """The models in the order of the training, those from outside the run behind them."""
    return sorted(models, key=lambda model: [*MODELS, model].index(model))
