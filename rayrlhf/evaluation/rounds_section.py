"""The report's section on iterated RLHF: what each round added, and what it was worth."""

from collections.abc import Mapping
from html import escape
from typing import Any

from rayrlhf.evaluation.cells import number, table
from rayrlhf.evaluation.words import JUDGES

Found = Mapping[str, Any]


def rounds_section(results: Mapping[str, Any]) -> str:
    """Return the table of the rounds; nothing for a run without."""
    rounds = results["rounds"]
    if rounds is None:
        return ""
    judges = results["battles"]["judges"]
    rows = [
        [
            f"<b>round {row['round']}</b>",
            f"{row['num_new']:,}",
            f"{row['num_comparisons']:,}",
            *[_share(row[key]) for key in ("pair_accuracy_before", "pair_accuracy")],
            _share(row["pair_accuracy_gain"], sign="+"),
            *[
                _gain(found["rating_gains"].get(f"round-{row['round']}"))
                for found in judges.values()
            ],
        ]
        for row in rounds["rounds"]
    ]
    header = [
        "",
        "new comparisons",
        "of all",
        "pair accuracy before",
        "after",
        "gain",
        *[f"rating gained, {JUDGES.get(judge, judge).removeprefix('the ')}" for judge in judges],
    ]
    return (
        "<section><h2>Rounds of feedback</h2>"
        '<p class="note">Each round samples answers of the policy before it, has them judged by '
        f"{escape(_judge(rounds['judge']))}, trains a new reward model on all comparisons so far, "
        "and goes on with PPO. Accuracy is that of the reward models before and after the round, "
        "on answers of the policy before it to prompts that are held out; the rating is what the "
        "round's policy gained over the one before it. Small figures are 95% intervals.</p>"
        + table(header, rows, "What each round added, and what it was worth")
        + "</section>"
    )


def _judge(judge: str) -> str:
    return "VADER" if judge == "vader" else judge


def _share(found: Found, *, sign: str = "") -> str:
    low, high = (f"{100 * found[key]:{sign}.1f}" for key in ("low", "high"))
    return number(found["value"], 1, scale=100, unit="%", more=f"{low} to {high}", sign=sign)


def _gain(found: Found | None) -> str:
    if found is None:
        return ""
    low, high = (f"{found[key]:+.0f}" for key in ("low", "high"))
    return number(found["elo"], 0, more=f"{low} to {high}", sign="+")
