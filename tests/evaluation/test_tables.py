"""Markdown tables of what was measured."""
from pathlib import Path

from utils.evaluation import tables


def test_a_sixth_benchmark_shifts_no_row_of_the_paper(monkeypatch):
    monkeypatch.setattr(tables, "VERIFIED", ("LFW", "VGG2-FP", *tables.VERIFIED[1:]))
    header, _, ours, first, *_ = tables.verification_table(Path("t/backbone.pth"), {"VGG2-FP": 91.0}).splitlines()
    rows = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in (ours, first)]
    assert rows[0]["VGG2-FP"] == "91.00" and rows[1]["VGG2-FP"] == ""
    assert (rows[1]["LFW"], rows[1]["AgeDB-30"], rows[1]["mean"]) == ("98.00", "86.43", "88.20")
