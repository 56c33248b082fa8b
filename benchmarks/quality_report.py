"""Tables and the frontier of the quality benchmark, from its results file."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu

COLUMNS = (
    *("variant", "seeds", "median AUC", "std", "loss", "loss / flat std"),
    *("p flat", "p strided", "bytes", "x fewer"),
)

MARKS = (("strided", "o", "C0"), ("balanced", "s", "C1"), ("coherent", "^", "C2"), ("diverse", "v", "C3"))

Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One variant over its seeds.

    Args:
        line: one of its lines, for what they share.
        aucs: test AUC of each seed.
        against_flat, against_strided: two-sided p of the Mann-Whitney test; ``None`` without the other row.
        loss: median AUC of the flat model less that of this one; ``None`` without a flat row.
        flat_std: standard deviation of the flat model over seeds, ``None`` without two of them.
    """

    line: dict[str, Any]
    aucs: tuple[float, ...]
    against_flat: float | None
    against_strided: float | None
    loss: float | None
    flat_std: float | None

    @property
    def median(self) -> float:
        """Of the test AUC."""
        return statistics.median(self.aucs)

    @property
    def std(self) -> float:
        """Of the test AUC, of a sample; 0 for one seed."""
        return statistics.stdev(self.aucs) if len(self.aucs) > 1 else 0.0

    @property
    def fewer_bytes(self) -> float | None:
        """What the flat exchange sends across hosts / what this one sends."""
        sent = self.line.get("cross_host_bytes")
        return self.line["flat_cross_host_bytes"] / sent if sent else None


def rows_of(lines: Lines) -> list[Row]:
    """Return a row for each variant, in the order of its first line."""
    aucs: dict[tuple[str, ...], list[float]] = defaultdict(list)
    first: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:
        if "test_auc" in line:
            key = (*_group(line), line["variant"])
            aucs[key].append(line["test_auc"])
            first.setdefault(key, line)
    found = []
    for key, line in first.items():
        mine, flat = aucs[key], aucs.get((*_group(line), "flat"), [])
        strided = aucs.get((*_group(line), line["variant"].replace(line["partition"], "strided", 1)), [])
        found.append(
            Row(
                line,
                tuple(mine),
                _p(mine, flat) if line["partition"] != "flat" else None,
                _p(mine, strided) if line["partition"] not in ("flat", "strided") else None,
                statistics.median(flat) - statistics.median(mine) if flat else None,
                statistics.stdev(flat) if len(flat) > 1 else None,
            )
        )
    return found


def report(lines: Lines, plot: Path | None, console: Console | None = None) -> None:
    """Print the tables, and the frontier; draw it where a path is given."""
    console = console or Console(width=160)
    rows = rows_of(lines)
    groups = list(dict.fromkeys(_group(row.line) for row in rows))
    for group in groups:
        mine = [row for row in rows if _group(row.line) == group]
        data, limit, model, _ = group
        title = f"{model} on {data}, {limit} rows; settings {_settings(mine[0].line)}"
        table = Table(title=title, title_justify="left")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "variant" else "right")
        for row in mine:
            table.add_row(
                row.line["variant"], str(len(row.aucs)), f"{row.median:.5f}", f"{row.std:.5f}",
                _number(row.loss, "+.5f"),
                _number(row.loss / row.flat_std if row.loss is not None and row.flat_std else None, "+.2f"),
                _number(row.against_flat, ".4f"), _number(row.against_strided, ".4f"),
                _number(row.line.get("cross_host_bytes"), ".0f"), _number(row.fewer_bytes, ".2f"),
            )  # fmt: skip
        console.print(table)
        _grid(mine, console)
        for line in lines:
            if _group(line) == group and "max_abs_error" in line:
                console.print(
                    f"transform without modules: certified equal to flat on {line['towers']} hosts, largest error of "
                    f"outputs and gradients {line['max_abs_error']:.1e}"
                )
        _frontier(mine, console)
    if plot is not None:
        _draw(rows, plot)
        console.print(f"drawn: {plot}")


def grid(rows: Sequence[Row]) -> dict[tuple[int, str, str], dict[int, float]]:
    """Return the loss of AUC at each compression, by number of towers, Tower Module and partition.

    Where a module was trained with several options at one compression, the first counts.
    """
    found: dict[tuple[int, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        line = row.line
        if row.loss is not None and line.get("module"):
            losses = found[line["towers"], line["module"], line["partition"]]
            losses.setdefault(line["compression"], row.loss)
    return dict(sorted(found.items(), key=lambda item: item[0][:2]))


def _grid(rows: Sequence[Row], console: Console) -> None:
    found = grid(rows)
    if len({towers for towers, _, _ in found}) < 2:
        return
    table = Table(title="loss of AUC against flat by compression", title_justify="left")
    compressions = sorted({compression for losses in found.values() for compression in losses})
    for name in ("towers", "module", "partition", *(f"{compression}x" for compression in compressions)):
        table.add_column(name, justify="left" if name in ("module", "partition") else "right")
    for (towers, module, partition), losses in found.items():
        cells = (_number(losses.get(compression), "+.4f") for compression in compressions)
        table.add_row(str(towers), module, partition, *cells)
    console.print(table)


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other row beats in both bytes and AUC, fewest bytes first, relative to flat's bytes."""
    towered = [row for row in rows if row.fewer_bytes]
    towered.sort(key=lambda row: (-(row.fewer_bytes or 0), -row.median))
    best: list[Row] = []
    for row in towered:
        if not best or row.median > best[-1].median:
            best.append(row)
    return best


def _frontier(rows: Sequence[Row], console: Console) -> None:
    best = frontier(rows)
    if not best:
        return
    table = Table(title="frontier: no row sends less at as good an AUC", title_justify="left")
    for name in ("x fewer bytes", "bytes a sample", "AUC loss", "variant"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in best:
        table.add_row(
            _number(row.fewer_bytes, ".2f"), _number(row.line["cross_host_bytes"], ".0f"),
            _number(row.loss, "+.5f"), row.line["variant"],
        )  # fmt: skip
    console.print(table)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the AUC loss over the share of bytes that still crosses hosts, one panel a model and data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = list(dict.fromkeys(_group(row.line) for row in rows if row.fewer_bytes and row.loss is not None))
    figure, axes = pyplot.subplots(1, max(len(groups), 1), figsize=(5 * max(len(groups), 1), 4.6), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=False):
        mine = [row for row in rows if _group(row.line) == group and row.fewer_bytes and row.loss is not None]
        for partition, mark, colour in MARKS:
            chosen = [row for row in mine if row.line["partition"].partition(":")[0] == partition]
            if chosen:
                shares = [100 / (row.fewer_bytes or 1) for row in chosen]
                spreads = [row.std for row in chosen]
                axis.errorbar(
                    shares, [row.loss for row in chosen], yerr=spreads, fmt=mark, color=colour, alpha=0.75, capsize=2
                )
        best = frontier(mine)
        axis.plot([100 / (row.fewer_bytes or 1) for row in best], [row.loss for row in best], "k--", lw=1)
        spread = mine[0].flat_std or 0.0
        axis.axhspan(-spread, spread, color="0.85", zorder=0)
        axis.set_xscale("log", base=2)
        ticks = sorted({round(100 / row.line["compression"], 2) for row in mine})
        axis.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
        axis.set_xlabel("bytes across hosts, share of the flat exchange")
        axis.set_title(f"{group[2]}, {group[0]}")
    axes[0][0].set_ylabel("loss of AUC against flat, medians")
    handles = [Line2D([], [], marker=mark, color=colour, ls="", label=name) for name, mark, colour in MARKS]
    handles += [Line2D([], [], color="k", ls="--", label="frontier"), Patch(color="0.85", label="flat, one std")]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _group(line: dict[str, Any]) -> tuple[str, str, str, str]:
    return line["data"], str(line["rows"]), line["model"], str(sorted(line["settings"].items()))


def _settings(line: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in line["settings"].items())


def _p(mine: Sequence[float], others: Sequence[float]) -> float | None:
    return float(mannwhitneyu(mine, others).pvalue) if mine and others else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
