"""Pieces of the pages: tables, numbers, durations, figures; all text escaped."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from rayrlhf.evaluation.style import STYLE

if TYPE_CHECKING:
    from rayrlhf.evaluation.plots import Figure


def page(title: str, heading: str, lead: str, body: str) -> str:
    """A whole page, without outside assets; what goes in is HTML already."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="over">rayrlhf report</p>
<h1>{heading}</h1>
{lead}
</header>
{body}
</main>
</body>
</html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of cells that are HTML already; the first one of each row is the row's header.

    A wide table scrolls in its own box, which the keyboard reaches.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    said = escape(caption)
    return (
        f'<div class="card scroll" role="region" aria-label="{said}" tabindex="0"><table>'
        f"<caption>{said}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def number(
    value: float | None,
    digits: int = 2,
    *,
    scale: float = 1.0,
    unit: str = "",
    more: str = "",
    sign: str = "",
) -> str:
    """A cell: the number, a dash where there is none, and a smaller line under it.

    The sign "+" shows that of positive numbers, too.
    """
    if value is None:
        return '<span class="muted">&ndash;</span>'
    small = f'<span class="more">{escape(more)}</span>' if more else ""
    return f"{scale * value:{sign}.{digits}f}{unit}{small}"


def definitions(entries: Mapping[str, str]) -> str:
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in entries.items()
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def figure_card(figure: "Figure") -> str:
    """The figure in both themes; the browser shows the one that fits."""
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        for png in (figure.light, figure.dark)
    )
    return (
        f'<figure class="card"><h3>{escape(figure.title)}</h3><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(figure.caption)}"></picture>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
