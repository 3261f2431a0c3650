"""One look for all pictures. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from st3.tools.common.palette import INK, LINES, PAPER


@dataclass(frozen=True)
class Theme:
    """Colours of ground, text and help lines, and of four groups of tokens."""

    name: str
    paper: str
    ink: str
    lines: str
    groups: tuple[str, str, str, str]  # after Okabe and Ito


LIGHT = Theme("light", PAPER, INK, LINES, ("#0072b2", "#009e73", "#b07800", "#a5517f"))
DARK = Theme("dark", "#16181b", "#ececec", "#5a5e64", ("#56b4e9", "#3fc79c", "#e69f00", "#e39cc4"))


@contextmanager
def canvas(size: tuple[float, float], font: float = 8.5, theme: Theme = LIGHT) -> Iterator[Any]:
    """A figure that needs no display, on a ground of its own, so that it reads the same on light
    and dark pages. The look holds for what is drawn in the block; save within it, too.

    Args:
        size: inches.
        font: of the numbers along the axes, points; labels and titles are a little larger.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_look(font, theme)):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def check_installed() -> None:
    """Raises ValueError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'st3[plot]'") from error


def _look(font: float, theme: Theme) -> Any:
    return {
        "font.size": font,
        "figure.facecolor": theme.paper,
        "figure.titlesize": font + 3,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.lines,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.labelsize": font + 1,
        "axes.titlesize": font + 2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.lines,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.5,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "xtick.labelsize": font,
        "ytick.labelsize": font,
        "legend.fontsize": font,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }
