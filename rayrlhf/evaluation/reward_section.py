"""The report's section on the reward model: tables by source."""

from collections.abc import Mapping
from html import escape
from typing import Any

from rayrlhf.evaluation.cells import number, table


def reward_section(results: Mapping[str, Any]) -> str:
    """Return the tables by source: agreement with people, length, and an ensemble's agreement."""
    by_source = results["reward_model"]
    if not by_source:
        return ""
    rows = [
        [
            f"<b>{escape(source)}</b>",
            *[
                number(row[key], 1, scale=100, unit="%")
                for key in ("pair_accuracy", "human_pair_accuracy", "vader_pair_accuracy")
            ],
            *[number(row[key]) for key in ("pearson", "vader_pearson")],
            f"{row['num_texts']:,}",
            f"{row['num_pairs']:,}",
        ]
        for source, row in by_source.items()
    ]
    return (
        "<section><h2>The reward model on texts it never saw</h2>"
        + table(
            [
                "source",
                "pair accuracy",
                "one human rater",
                "VADER's rules",
                "r with mean rating",
                "VADER's r",
                "texts",
                "pairs",
            ],
            rows,
            "Agreement with people on held-out texts, by source",
        )
        + _length_table(by_source)
        + _ensemble_table(by_source)
        + "</section>"
    )


def _length_table(by_source: Mapping[str, Any]) -> str:
    rows = []
    for source, row in by_source.items():
        bias = row["length_bias"]
        rows.append(
            [
                f"<b>{escape(source)}</b>",
                number(bias["pearson"]),
                number(bias["rating_pearson"]),
                number(bias["partial"]),
                *[
                    number(bias[f"pair_accuracy_better_{side}"], 1, scale=100, unit="%")
                    for side in ("longer", "shorter")
                ],
                number(row["calibration_error"], 1, scale=100, unit="%"),
            ]
        )
    header = [
        "source",
        "r of score and length",
        "r of rating and length",
        "r with length given the rating",
        "right, better is longer",
        "right, better is shorter",
        "calibration error",
    ]
    note = (
        '<p class="note">Does it like long responses as such? Then the fourth column is far from '
        "0, and it is right more often where the better response is the longer one.</p>"
    )
    return note + table(header, rows, "How length and score go together, by source")


def _ensemble_table(by_source: Mapping[str, Any]) -> str:
    rows = []
    for source, row in by_source.items():
        if "ensemble" not in row:
            continue
        found = row["ensemble"]
        members = found["member_pair_accuracy"]
        accuracies = [
            sum(members) / len(members),
            found["pair_accuracy"],
            *[third["pair_accuracy"] for third in found["by_disagreement"]],
        ]
        rows.append(
            [
                f"<b>{escape(source)}</b>",
                *[number(accuracy, 1, scale=100, unit="%") for accuracy in accuracies],
                number(found["disagreement"]),
                number(found["error_correlation"]),
            ]
        )
    if not rows:
        return ""
    num = max(row["ensemble"]["num_members"] for row in by_source.values() if "ensemble" in row)
    header = [
        "source",
        "one member",
        "all together",
        "agreeing third",
        "middle third",
        "disagreeing third",
        "disagreement",
        "r of disagreement and error",
    ]
    note = (
        f'<p class="note">Pair accuracy of {num} reward models with seeds of their own: their mean '
        "score, and by thirds of the pairs on which they agree most to least. Disagreement is "
        "in standard deviations of a member's scores.</p>"
    )
    return note + table(header, rows, "What the members of the ensemble agree on, by source")
