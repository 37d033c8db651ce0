"""Who holds what, as a picture: bars of samples above a heat map of classes, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedkit.data.skew import Counts, shares
from fedkit.errors import FedkitError, UsageError

SUFFIXES = (".png", ".svg", ".pdf")
# More classes than this are told apart by a colour scale, not by a legend.
LEGEND = 20
LONGEST_NAME = 16


def check_picture(path: Path) -> None:
    """Raise ``UsageError`` unless a picture can be drawn to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot takes a file ending in {', '.join(SUFFIXES)}, not {path}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs the package matplotlib: `pip install 'fedkit[plot]'`."
        ) from error


def readable(name: str) -> str:
    """A class's name; that of a space or a line's end, as texts have them, in quotes."""
    return name if name.strip() and name.isprintable() else repr(name)


def draw(counts: Counts, names: Sequence[str], title: str, about: str, path: Path) -> None:
    """Draw ``counts`` (int64, shards x classes) of the classes ``names`` to a PNG, SVG or PDF file.

    Raises:
        FedkitError: the file can't be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shards, classes = counts.shape
    width = float(np.clip(4.5 + 0.3 * shards, 8, 20))
    map_height = float(np.clip(0.28 * classes, 2.6, 11))
    # A name like $5 is no formula.
    with rc_context({"text.parse_math": False, "svg.hashsalt": "fedkit"}):
        figure = Figure(figsize=(width, 3.4 + map_height), layout="constrained")
        FigureCanvasAgg(figure)
        bars, heat = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, map_height])
        figure.suptitle(title, fontsize=13, fontweight="bold")
        bars.set_title(about, fontsize=9, color="0.35")
        colours = _colours(classes)
        _draw_bars(bars, counts, names, colours)
        _draw_heat(figure, heat, counts, names)
        if classes > LEGEND:
            _draw_scale(figure, bars, colours)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise FedkitError(f"The picture {path} can't be written: {error.strerror}.") from error


def _draw_bars(bars: Any, counts: Counts, names: Sequence[str], colours: Any) -> None:
    shards, classes = counts.shape
    below = np.zeros(shards, dtype=np.int64)
    for kind in range(classes):
        column = counts[:, kind]
        bars.bar(
            np.arange(shards), column, bottom=below, width=0.86, color=colours[kind],
            label=_short(names[kind]),
        )  # fmt: skip
        below += column
    bars.set_ylabel("samples")
    bars.margins(x=0)
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(axis="x", which="both", length=0)
    if classes <= LEGEND:
        # Read from the top, as the classes are stacked and as the map lists them.
        handles, labels = bars.get_legend_handles_labels()
        bars.legend(
            handles, labels, loc="center left", bbox_to_anchor=(1.003, 0.5), fontsize=8,
            frameon=False, ncols=1 if classes <= 12 else 2, reverse=True,
        )  # fmt: skip


def _draw_heat(figure: Any, heat: Any, counts: Counts, names: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    shards, classes = counts.shape
    held = shares(counts)
    # What a shard does not hold at all is white, and the least that it holds is not.
    blues = ListedColormap(colormaps["Blues"](np.linspace(0.15, 1, 256)), bad="white")
    shown = np.ma.masked_equal(held.T, 0.0)
    image = heat.imshow(shown, aspect="auto", origin="lower", cmap=blues, vmin=0, vmax=held.max())
    heat.set_xlabel("shard")
    heat.set_ylabel("class")
    step = next(step for step in (1, 2, 5, 10, 20, 50, shards) if shards <= 40 * step)
    heat.set_xticks(np.arange(0, shards, step))
    size = 8 if classes <= 40 else 5.5
    heat.set_yticks(np.arange(classes), [_short(name) for name in names], fontsize=size)
    heat.set_xticks(np.arange(shards + 1) - 0.5, minor=True)
    heat.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    heat.grid(which="minor", color="0.88", linewidth=0.4)
    heat.tick_params(which="minor", length=0)
    if shards <= 25 and classes <= LEGEND:
        for shard, kind in np.argwhere(counts > 0):
            dark = held[shard, kind] > held.max() / 2
            heat.text(
                shard, kind, str(counts[shard, kind]), ha="center", va="center", fontsize=6.5,
                color="white" if dark else "black",
            )  # fmt: skip
    _scale(figure, heat, image, "share of the shard")


def _draw_scale(figure: Any, bars: Any, colours: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # A class's colour lies in the middle of its own piece of the scale.
    norm = Normalize(-0.5, len(colours) - 0.5)
    _scale(figure, bars, ScalarMappable(norm, ListedColormap(colours)), "class, from the bottom")


def _scale(figure: Any, axes: Any, colours: Any, label: str) -> None:
    bar = figure.colorbar(colours, cax=axes.inset_axes((1.012, 0, 0.014, 1)))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _colours(classes: int) -> Any:
    from matplotlib import colormaps

    if classes <= 10:
        return colormaps["tab10"](np.arange(classes))
    if classes <= LEGEND:
        return colormaps["tab20"](np.arange(classes))
    return colormaps["turbo"](np.linspace(0, 1, classes))


def _short(name: str) -> str:
    name = readable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
