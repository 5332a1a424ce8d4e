"""report.html: what the run was, what came out, and what the models say, in one file.

Everything is inside the file: no script, no font, no image from elsewhere. Numbers come from
results.json and metrics.jsonl; all text that a model or a data set wrote is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rayrlhf.evaluation.battles_section import battles_section
from rayrlhf.evaluation.cells import definitions, duration, figure_card, number, page, table
from rayrlhf.evaluation.corpus_section import corpus_section
from rayrlhf.evaluation.cost_section import (
    answer_card,
    hacking_section,
    overoptimisation_section,
    tax_section,
    variety_section,
)
from rayrlhf.evaluation.plots import Figure
from rayrlhf.evaluation.reward_section import reward_section
from rayrlhf.evaluation.rounds_section import rounds_section
from rayrlhf.evaluation.words import JUDGES, MODELS, STAGES, last_model, model_word

Results = Mapping[str, Any]

MEASURES = {
    "win rate": "share of the held-out prompts on which a model's answer has the higher score; a "
    "tie counts half. VADER is a set of rules that no training stage saw. The reward model is what "
    "PPO maximises, so a win by it alone proves little.",
    "rating": "Bradley-Terry strength on Elo's scale, from the battles of all models on the same "
    "prompts: 400 points are odds of 10 to 1.",
    "at equal lengths": "length-controlled win rate (AlpacaEval 2): a regression of wins on the "
    "difference of lengths in characters, read where there is none.",
    "KL": "how far a model is from the reference, in nats per response, measured on the model's "
    "own responses.",
    "entropy": "of the model's next-token distribution at the tokens of its own responses, in "
    "nats: e to its power is the number of equally likely tokens.",
    "distinct-2": "share of word pairs that occur only once or for the first time, over all "
    "responses; 1 is never a repetition.",
    "self-BLEU": "how much of an answer's wording, runs of up to four words, is in the others: of "
    "the answers to all prompts, or of many to one prompt. 0 to 1; 1 is always the same answer.",
    "proxy and gold reward": "scores of the reward model that is maximised, and of one that "
    "learned from other comparisons. Where the proxy goes on rising and the gold reward falls, the "
    "policy lives on the proxy's errors.",
    "best of n": "of n answers the one with the highest proxy reward; log n - (n - 1) / n nats "
    "away from the model that answers.",
    "held-out loss": "mean negative log-probability of texts that no stage trained on, in nats per "
    "token; lower is better.",
    "pair accuracy": "over all pairs of held-out texts with different mean ratings, how often the "
    "one that people rated higher has the higher score.",
    "r with length given the rating": "correlation of score and response length among texts that "
    "people rated alike (partial correlation); 0 is a model that length as such does not sway.",
    "calibration error": "mean distance between how certain the reward model is of a pair and how "
    "often it is right then (expected calibration error, ten bins).",
    "one human rater": "the same, for one person judged by the mean of all the others.",
}


def write_report(
    path: Path, results: Results, figures: Sequence[Figure], *, recipe_yaml: str
) -> Path:
    """Write the report and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    new.write_text(render(results, figures, recipe_yaml=recipe_yaml), encoding="utf-8")
    new.replace(path)
    return path


def render(results: Results, figures: Sequence[Figure], *, recipe_yaml: str) -> str:
    """Return the whole page."""
    title = escape(str(results["name"]))
    drawn = "".join(map(figure_card, figures))
    return page(
        f"{title}: rayrlhf report",
        f"{title}",
        f"""<p>{_lead(results)}</p>
<div class="tiles">{_tiles(results)}</div>""",
        f"""<section><h2>The models</h2>{_models_table(results)}</section>
{battles_section(results)}
{rounds_section(results)}
{reward_section(results)}
{variety_section(results)}
{tax_section(results)}
{overoptimisation_section(results)}
{corpus_section(results["corpus"])}
<section><h2>Figures</h2><div class="figures">{drawn}</div></section>
{_samples_section(results)}
{hacking_section(results)}
<section><h2>What the run was</h2>{_run(results, recipe_yaml)}</section>
<section><h2>What the numbers mean</h2><div class="card"><details open><summary>Measures</summary>
<dl style="margin-top:12px">{definitions(MEASURES)}</dl></details></div></section>""",
    )


def _lead(results: Results) -> str:
    models = [MODELS[m] for m in MODELS if m in results["models"]]
    listed = " and ".join(filter(None, [", ".join(models[:-1]), models[-1]]))
    verb = "answer" if len(models) > 1 else "answers"
    return (
        f"{escape(listed[0].upper() + listed[1:])} {verb} the same {results['num_prompts']} "
        f"held-out prompts with up to {results['max_response_tokens']} tokens each, sampled at "
        f"temperature {results['temperature']:g}, seed {results['seed']}."
    )


def _tile(value: str, name: str, more: str, *, main: bool = False) -> str:
    return (
        f'<div class="card tile{" main" if main else ""}"><b>{escape(value)}</b>'
        f'<div class="name">{escape(name)}</div><div class="more">{escape(more)}</div></div>'
    )


def _tiles(results: Results) -> str:
    """The few numbers that one looks for first."""
    reference, trained = results["reference"], last_model(results)
    tiles = []
    if trained != reference:
        word = model_word(trained)
        for judge, rate in results[f"win_rate_vs_{reference}"][trained].items():
            low, high = results["intervals"][f"win_rate_vs_{reference}"][trained][judge]
            tiles.append(
                _tile(
                    f"{100 * rate:.0f}%",
                    f"{word} preferred to {MODELS[reference]}",
                    f"by {JUDGES[judge]}, {100 * low:.0f} to {100 * high:.0f}%",
                    main=judge == results["ratings_judge"],
                )
            )
        kl = results["kl_ref_per_response"][trained]
        tiles.append(
            _tile(f"{kl:.1f}", "KL, nats per response", f"{word} from {MODELS[reference]}")
        )
        base = results["distinct_2"][reference]
        if base:
            share = results["distinct_2"][trained] / base
            tiles.append(
                _tile(
                    f"{100 * share:.0f}%",
                    "of the variety kept",
                    f"distinct-2 of {word} over {MODELS[reference]}",
                )
            )
    for source, row in list(results["reward_model"].items())[:1]:
        human = row["human_pair_accuracy"]
        tiles.append(
            _tile(
                f"{100 * row['pair_accuracy']:.0f}%",
                f"reward model right on {source}",
                f"one human rater {100 * human:.0f}%"
                if human is not None
                else f"{row['num_pairs']:,} pairs",
            )
        )
    return "".join(tiles)


def _models_table(results: Results) -> str:
    reference = results["reference"]
    rates = results[f"win_rate_vs_{reference}"]
    bounds = results["intervals"][f"win_rate_vs_{reference}"]
    judges = results["judges"]
    header = [
        "model",
        *[f"win rate, {JUDGES[judge]}" for judge in judges],
        f"rating, {JUDGES[results['ratings_judge']]}",
        "KL, nats",
        "entropy, nats",
        "distinct-2",
        "tokens",
        "ended",
    ]
    rows = []
    for model in [m for m in MODELS if m in results["models"]]:
        cells = [f"<b>{escape(MODELS[model])}</b>"]
        for judge in judges:
            if model == reference:
                cells.append('<span class="muted">reference</span>')
                continue
            low, high = bounds[model][judge]
            cells.append(
                number(
                    rates[model][judge],
                    0,
                    scale=100,
                    unit="%",
                    more=f"{100 * low:.0f} to {100 * high:.0f}",
                )
            )
        rating = results["ratings"][model]
        cells.append(
            number(
                rating["elo"],
                0,
                more="" if model == reference else f"{rating['low']:.0f} to {rating['high']:.0f}",
            )
        )
        cells += [
            number(results["kl_ref_per_response"][model], 1),
            number(results["entropy_nats_per_token"][model]),
            number(results["distinct_2"][model]),
            number(results["response_length"][model], 1),
            number(results["ended_fraction"][model], 0, scale=100, unit="%"),
        ]
        rows.append(cells)
    return table(header, rows, f"The models, compared with {MODELS[reference]}") + (
        f'<p class="note">Win rates, ratings and KL are against {escape(MODELS[reference])}; the '
        "small figures are 95% intervals, with the prompt as the unit.</p>"
    )


def _samples_section(results: Results) -> str:
    if not results["samples"]:
        return ""
    shown = [answer_card(sample) for sample in results["samples"]]
    return (
        f"<section><h2>The same prompts, every stage</h2>"
        f'<p class="note">The first {len(shown)} of the {results["num_prompts"]} prompts, not '
        "chosen by hand. An ellipsis marks an answer that was cut off at the limit.</p>"
        f"{''.join(shown)}</section>"
    )


def _run(results: Results, recipe_yaml: str) -> str:
    seconds = results["seconds"]
    road = "".join(
        f'<li class="card">{escape(STAGES[stage])}<span>{duration(spent)}</span></li>'
        for stage, spent in seconds.items()
    )
    total = f" In all {duration(sum(seconds.values()))}." if len(seconds) > 1 else ""
    facts = {
        "written": results["created"],
        "commit": results["commit"] or "not a checkout",
        "machine": results["machine"],
        "versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        **{f"model {MODELS[model]}": path for model, path in results["models"].items()},
    }
    return (
        f'<p class="note">Wall-clock time of each stage.{total}</p><ul class="road">{road}</ul>'
        f'<div class="card" style="padding:14px 18px;margin:0 0 12px"><dl>'
        f"{definitions(facts)}</dl></div>"
        f'<details class="card"><summary>Recipe</summary><pre>{escape(recipe_yaml)}</pre>'
        "</details>"
    )
