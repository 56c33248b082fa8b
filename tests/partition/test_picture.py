"""The picture of the plane: what it shows, in both formats, and its errors."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from dmt_compile import InteractionMatrix, TableSpec, Topology, TowerPlan, save_picture
from dmt_compile.errors import ConfigError, PlanError
from dmt_compile.partition.assign import make_plan
from dmt_compile.partition.picture import COLORS, SHAPES, _overlap


def planned(tables: int, towers: int) -> tuple[TowerPlan, InteractionMatrix]:
    names = tuple(f"emb.{k}" for k in range(tables))
    noise = np.random.default_rng(0).random((tables, tables))
    matrix = InteractionMatrix(names, names, (noise + noise.T) / 2, "cosine", 100)
    specs = [TableSpec(name, 10, 4) for name in names]
    return make_plan(specs, Topology(towers, 1), partition="coherent", interactions=matrix), matrix


def test_svg_names_tables_and_towers_and_repeats_itself(tmp_path: Path) -> None:
    plan, matrix = planned(9, 3)
    save_picture(plan, matrix, tmp_path / "a.svg", {"emb.0": "month"})
    save_picture(plan, matrix, tmp_path / "b.svg", {"emb.0": "month"})
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for wanted in ("month", "emb.8", "tower0 (3)", "coherent partition: 9 tables in 3 towers", COLORS[2].lower()):
        assert wanted in text
    assert "emb.0<" not in text


def test_png_has_its_size_and_many_towers_differ_in_shape(tmp_path: Path) -> None:
    plan, matrix = planned(130, 65)
    save_picture(plan, matrix, tmp_path / "many.png")
    content = (tmp_path / "many.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1350, 975)
    assert len(COLORS) * len(SHAPES) >= 64


def test_towers_without_tables_are_drawn(tmp_path: Path) -> None:
    plan, matrix = planned(2, 4)
    save_picture(plan, matrix, tmp_path / "few.svg")
    assert "tower3 (0)" in (tmp_path / "few.svg").read_text()


def test_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, matrix = planned(4, 2)
    with pytest.raises(ConfigError, match=r"picture: expected a path that ends in \.svg or \.png, found towers\.pdf"):
        save_picture(plan, matrix, "towers.pdf")
    other, _ = planned(5, 2)
    with pytest.raises(PlanError, match=re.escape("expected every table in the interactions, found none for emb.4")):
        save_picture(other, matrix, tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"expected the package matplotlib, found none; run pip install 'dmt_compile"):
        save_picture(plan, matrix, tmp_path / "a.svg")


def test_overlaps_of_boxes() -> None:
    assert _overlap((0, 0, 2, 2), (1, 1, 5, 5)) == 1
    assert _overlap((0, 0, 2, 2), (2, 0, 3, 3)) == 0
