"""The report's section on the corpus: what was read, what was dropped and why, what was mixed."""

from collections.abc import Mapping
from html import escape
from typing import Any

from rayrlhf.evaluation.cells import number, table

_HEADER = (
    "source",
    "documents",
    "dropped",
    "kept",
    "epochs",
    "tokens in the mixture",
    "share",
    "bytes per token",
    "tokens per word",
)


def corpus_section(manifest: Mapping[str, Any] | None) -> str:
    """Return the section, empty for a run without a corpus."""
    if manifest is None:
        return ""
    train = manifest["splits"]["train"]
    rows = [
        [
            f"<b>{escape(source)}</b>",
            f"{counts['read']:,}",
            f"{sum(counts['dropped'].values()):,}",
            f"{counts['kept']:,}",
            number(manifest["epochs"].get(source)),
            f"{counts['tokens']:,}",
            number(counts["tokens"] / max(1, train["document_tokens"]), 1, scale=100, unit="%"),
            number(counts["bytes"] / max(1, counts["tokens_read"])),
            number(counts["tokens_read"] / max(1, counts["words"])),
        ]
        for source, counts in train["sources"].items()
    ]
    filled = f" and {train['padding']:,} of filling" if train["padding"] else ""
    note = (
        f"{train['rows']:,} rows of {manifest['row_length']:,} tokens: "
        f"{train['document_tokens']:,} of documents, {train['delimiters']:,} ends of documents"
        f"{filled}, less {train['tail_tokens_dropped']:,} in unfinished rows."
    )
    errors = "".join(f"<li>{escape(error)}</li>" for error in manifest["errors"])
    left_out = (
        f'<details class="card"><summary>{manifest["num_errors"]:,} records or files that can\'t '
        f"be read</summary><ul>{errors}</ul></details>"
        if errors
        else ""
    )
    return (
        "<section><h2>The corpus</h2>"
        + table(_HEADER, rows, "What each source gave to the corpus")
        + f'<p class="note">{note}</p>{_dropped(train)}{left_out}</section>'
    )


def _dropped(train: Mapping[str, Any]) -> str:
    """What each rule dropped, with how some of the documents begin."""
    rows = []
    for source, counts in train["sources"].items():
        for reason, count in counts["dropped"].items():
            quotes = "".join(
                f'<span class="more">{escape(" ".join(quote.split())[:120])}</span>'
                for quote in counts["examples"].get(reason, [])
            )
            if count:
                rows.append(
                    [escape(reason.replace("_", " ")), escape(source), f"{count:,}", quotes]
                )
    if not rows:
        return ""
    return (
        '<details class="card"><summary>Documents that were dropped, and why</summary>'
        + table(
            ("rule", "source", "documents", "how some begin"),
            sorted(rows),
            "Documents dropped by each rule",
        )
        + "</details>"
    )
