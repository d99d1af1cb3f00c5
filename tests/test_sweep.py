"""Recipes side by side: rows, their store, and the tables made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tvm_vitq import sweep as module
from tvm_vitq.errors import VitqError
from tvm_vitq.sweep import Result, read_store, sweep
from tvm_vitq.sweep_tables import markdown

ROW = Result(
    "refmodel:vit", "w4a4", "mse", 40, 90.0, 80.0, 82.5, 11.8, 15.0, 95.0, 1.5, 1.01, "1"
)  # fmt: skip


def test_rows_are_measured_once_and_kept(tmp_path, monkeypatch):
    store = tmp_path / "rows.jsonl"
    asked = (["refmodel:vit"], ["w8a8"], ["minmax", "percentile"], "refmodel")
    options = {"limit": 40, "batch": 20, "store": store, "progress": False}
    rows = list(sweep(*asked, **options))
    assert [r.recipe for r in rows] == ["minmax", "percentile"] and rows[0].images == 40
    for row in rows:
        assert abs(row.compiled - row.float_top1) <= 10 and row.agreement >= 90 and row.sqnr > 20
        assert row.latency is not None and 0.2 < row.latency < 5 and row.seconds > 0
    assert read_store(store) == rows
    monkeypatch.setattr(module, "_Bench", None)  # nothing is computed a second time
    assert list(sweep(*asked, **options)) == rows


def test_interrupted_store_goes_on(tmp_path):
    store = tmp_path / "rows.jsonl"
    module._append(store, ROW)
    whole = store.read_text()
    store.write_text(whole + whole[:30])
    assert read_store(store) == [ROW]
    other = dataclasses.replace(ROW, recipe="auto")
    module._append(store, other)
    assert read_store(store) == [ROW, other]
    store.write_text("{}\n" + whole)
    with pytest.raises(VitqError, match="line 1"):
        read_store(store)


def test_mistakes_are_told_before_the_work(monkeypatch):
    monkeypatch.setattr(module, "_Bench", None)
    for recipes, bits, message in ((["percentil"], "w8a8", "percentile"), (["mse"], "w9a8", "2 to 8")):
        with pytest.raises(VitqError, match=message):
            list(sweep(["refmodel:vit"], [bits], recipes, "refmodel"))


def test_markdown_sorts_by_accuracy():
    better = dataclasses.replace(ROW, recipe="auto", compiled=85.0, latency=None)
    text = markdown([ROW, better])
    assert text.index("| `auto` | 85.00 ± 11.80 ") < text.index("| `mse` | 82.50 ± 11.80 ")
    assert text.count("## refmodel:vit, w4a4") == 1 and "| - |" in text


def test_markdown_pools_differences_of_program_and_simulation():
    rows = [
        dataclasses.replace(ROW, recipe=name, compiled=80 + difference, paired=0.3)
        for name, difference in (("mse", 1.0), ("peg", -0.1), ("auto", 0.0))
    ]
    text = markdown([*rows, dataclasses.replace(ROW, recipe="erq")])  # of a version without the interval
    assert "| w4a4 | 3 | +0.30 ± 0.17 | 1 |" in text
    assert "| +1.00 ± 0.30 |" in text and "| +2.50 |" in text


def test_documented_tables_are_those_of_the_kept_rows():
    """docs/accuracy.jsonl is the store of the sweep; docs/accuracy.md comes from it by --markdown."""
    docs = Path(__file__).parent.parent / "docs"
    rows = read_store(docs / "accuracy.jsonl")
    assert rows and (docs / "accuracy.md").read_text(encoding="utf-8") == markdown(rows)
    assert len({row.key for row in rows}) == len(rows)
