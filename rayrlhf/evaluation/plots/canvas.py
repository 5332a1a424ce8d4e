"""What the figures share: colours of both grounds, the PNGs, lines over steps."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

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
        "dpo": "#8a4fd3",
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
        "dpo": "#b58cff",
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


def render(
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


def series(records: Records, key: str) -> tuple[Floats, Floats]:
    """Return steps and values of the records that have a number at `key`."""
    kept = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def smooth(values: Floats) -> Floats:
    """Return the mean over a window of a fifteenth of the values around each of them."""
    half = max(0, len(values) // 30)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    starts, ends = np.maximum(0, at - half), np.minimum(len(values), at + half + 1)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def line(
    ax: Axes, theme: Theme, steps: Floats, values: Floats, colour: str, label: str | None = None
) -> None:
    ax.plot(steps, values, color=theme.colours["faint"], linewidth=0.8)
    ax.plot(steps, smooth(values), color=theme.colours[colour], linewidth=1.8, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def ends(values: Floats) -> tuple[float, float]:
    """Return the means of the first and of the last tenth of the values."""
    part = max(1, len(values) // 10)
    return float(values[:part].mean()), float(values[-part:].mean())
