"""A picture of the tables on the plane, with their towers.

Shape suffixes: T tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmt_compile.errors import ConfigError
from dmt_compile.partition.interaction import InteractionMatrix, inside_share
from dmt_compile.partition.planar import distances, planar_embedding
from dmt_compile.plan import TowerPlan

# Okabe and Ito's colours, which colour-blind readers tell apart; another shape for each further round of them.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#8A8A00")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
SIZE_INCHES = (9.0, 6.5)
FONT_POINTS, LETTER_WIDTH = 7.5, 0.58  # of the labels; a letter's mean width, in its height
MAX_LABELS = 120  # beyond, labels would hide the points
FORMATS = (".svg", ".png")


def save_picture(
    plan: TowerPlan,
    interactions: InteractionMatrix,
    path: str | Path,
    labels: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Draw where interaction puts the plan's tables on a plane, and which tower has each.

    Args:
        plan: of any partition.
        interactions: what the plane shows: tables that interact are close (the paper's coherent distances).
        path: ends in ``.svg`` or ``.png``.
        labels: what to write at a table's point instead of its name.
        seed: of the planar embedding.

    Raises:
        ConfigError: another ending; matplotlib is not installed (the extra ``plot``).
        PlanError: the interactions do not know one of the tables.

    Cost: a planar embedding of the tables, see :func:`dmt_compile.partition.planar.planar_embedding`.
    Source: figure 9 of the DMT paper.
    """
    if Path(path).suffix not in FORMATS:
        raise ConfigError(f"picture: expected a path that ends in .svg or .png, found {path}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "picture: expected the package matplotlib, found none; run pip install 'dmt_compile[plot]'"
        ) from error
    names = [table.name for table in plan.tables]
    matrix_TT = interactions.of_tables(names)
    points_T2 = planar_embedding(distances(matrix_TT, "coherent"), seed=seed)
    tower_of = {name: k for k, tower in enumerate(plan.towers) for name in tower.tables}
    towers_T = np.array([tower_of[name] for name in names], dtype=np.int64)
    share = inside_share(matrix_TT, towers_T.tolist())
    with rc_context({"svg.hashsalt": "dmt_compile", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(
            f"{plan.partition} partition: {len(names)} tables in {len(plan.towers)} towers, "
            f"{share:.0%} of {interactions.signal} interaction inside towers",
            fontsize=11,
            loc="left",
        )
        for k, tower in enumerate(plan.towers):
            mine_T2 = points_T2[towers_T == k]
            color, shape = COLORS[k % len(COLORS)], SHAPES[k // len(COLORS) % len(SHAPES)]
            center = mine_T2.mean(axis=0) if len(mine_T2) else np.zeros(2)
            for point in mine_T2:
                axes.plot(*zip(center, point, strict=True), color=color, alpha=0.35, linewidth=0.8, zorder=1)
            label = f"{tower.name} ({len(mine_T2)})"
            axes.scatter(mine_T2[:, 0], mine_T2[:, 1], s=34, color=color, marker=shape, label=label, linewidths=0, zorder=2)
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.08)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#BBBBBB")
        axes.set_xlabel("distance on the plane: 1 - interaction", fontsize=9, color="#444444")
        columns = 1 + (len(plan.towers) - 1) // 24
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=columns)
        if len(names) <= MAX_LABELS:
            figure.draw_without_rendering()  # so that points have their places
            _label(axes, [(labels or {}).get(name, name) for name in names], points_T2)
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _label(axes: Any, names: list[str], points_T2: NDArray[np.float64]) -> None:
    """Write each name beside its point, where it covers least of other points and names."""
    points_per_pixel = 72 / axes.figure.dpi
    places = axes.transData.transform(points_T2) * points_per_pixel
    boxes = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    for name, (x, y), point in zip(names, places, points_T2, strict=True):
        width, height = LETTER_WIDTH * FONT_POINTS * len(name), FONT_POINTS
        offsets = [(5, -height / 3), (-5 - width, -height / 3), (-width / 2, 5), (-width / 2, -5 - height)]
        offsets += [(4, 4), (-4 - width, 4), (4, -4 - height), (-4 - width, -4 - height)]
        choices = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in offsets]
        best = min(range(len(choices)), key=lambda k: sum(_overlap(choices[k], box) for box in boxes))
        boxes.append(choices[best])
        axes.annotate(
            name, point, xytext=offsets[best], textcoords="offset points", fontsize=FONT_POINTS, color="#222222"
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the area that two boxes (left, bottom, right, top) have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
