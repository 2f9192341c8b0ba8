"""Charts by matplotlib as SVG elements whose colors follow the page's theme."""

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distrain.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010101"
"""Color of text and axes."""
FAINT = "#020202"
"""Color of grids and events."""
COLORS = tuple(f"#0{i}03{i:02x}" for i in range(1, 9))
"""Colors of curves."""
# What stands for each of them in the page: a variable of its style sheet.
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    **{color: f"var(--c{i})" for i, color in enumerate(COLORS, 1)},
}
_WIDTH_INCHES = 5.2


def require_matplotlib() -> None:
    """Check that charts can be drawn. Raises UserError: matplotlib is missing."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise UserError(
            "reports need matplotlib: pip install 'distrain[report]'"
        ) from None


class Chart:
    """One chart: draw on its `axes`, then render it."""

    def __init__(self, name: str, title: str, axes: "Axes", figure: "Figure") -> None:
        self.name = name
        """Unique in the page."""
        self.title = title
        self.axes = axes
        self.figure = figure

    def to_svg(self, description: str) -> str:
        """Return the chart as an SVG element.

        Args:
            description: what it shows, for screen readers.
        """
        file = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with _use_style(self.name), warnings.catch_warnings():
            # The browser draws the text, with fonts of its own.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(file, format="svg", metadata=metadata)
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :]
        # Ids are unique in a chart only, and the page has several.
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = svg.replace("url(#", f"url(#{self.name}-")
        svg = svg.replace('xlink:href="#', f'xlink:href="#{self.name}-')
        for color, variable in _VARIABLES.items():
            svg = svg.replace(color, variable)
        head, rest = svg.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head)
        label = html.escape(f"{self.title}. {description}", quote=True)
        return f'{head} role="img" aria-label="{label}">{rest}'


@contextmanager
def open_chart(
    name: str, title: str, x_label: str, y_label: str, height_inches: float = 2.9
) -> Iterator[Chart]:
    """Open a chart with one pair of axes, to be drawn in the block.

    Args:
        name: id in the page: letters and hyphens.
        title: its heading.
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical axis, with its unit.
        height_inches: of the chart; it is 5.2 inches wide.
    """
    # Not pyplot, which would choose a backend that may need a display.
    from matplotlib.figure import Figure

    with _use_style(name):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(visible=True)
        axes.margins(x=0.02)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        yield Chart(name, title, axes, figure)


@contextmanager
def _use_style(name: str) -> Iterator[None]:
    import matplotlib as mpl

    style: Any = {
        # Text stays text: the browser's font, found by a search, read by a reader.
        "svg.fonttype": "none",
        # A name may hold a dollar.
        "text.parse_math": False,
        # Ids that are the same in each report.
        "svg.hashsalt": name,
        # Curves are thinned before; this would drop their extremes.
        "path.simplify": False,
        "font.size": 10,
        "lines.linewidth": 1.4,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.labelcolor": INK,
    }
    with mpl.rc_context(style):
        yield
