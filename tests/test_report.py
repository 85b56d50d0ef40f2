"""utils.report: figures survive the way to disk and back, tables show the best, texts are escaped."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from utils import report
from utils.evaluation import Interval
from utils.report import Table, frame, load_results, record, say, show_table
from utils.settings import settings


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "WORK", tmp_path)
    return tmp_path


def read(work, lesson: str) -> dict:
    return json.loads((work / "results" / f"{lesson}.json").read_text(encoding="utf-8"))


def test_a_record_carries_figures_and_what_they_were_found_with(work):
    record("01_a", {"recall": np.float32(0.5), "n": np.int64(7), "ids": ["a", "b"], "curve": np.arange(3),
                    "nothing": math.nan, "interval": Interval(0.5, 0.4, 0.6), "by kind": pd.Series({"x": 1.5})},
           seeds=(1, 2))
    kept = read(work, "01_a")
    assert kept["figures"] == {"recall": 0.5, "n": 7, "ids": ["a", "b"], "curve": [0, 1, 2], "nothing": None,
                               "interval": {"mean": 0.5, "low": 0.4, "high": 0.6}, "by kind": {"x": 1.5}}
    assert kept["mode"] == settings.mode and kept["seeds"] == [1, 2] and "torch" in kept["versions"]
    assert "seeds 1, 2" in kept["banner"] and kept["hardware"] in kept["banner"] and kept["date"] in kept["banner"]
    assert not list(work.rglob("*.part"))


def test_a_second_record_adds_and_another_seed_starts_afresh(work):
    record("01_a", {"x": 1, "y": 1})
    record("01_a", {"y": 2})
    assert read(work, "01_a")["figures"] == {"x": 1, "y": 2}
    record("01_a", {"z": 3}, seeds=(9,))
    assert read(work, "01_a")["figures"] == {"z": 3}


def test_a_table_comes_back_as_it_was(work):
    table = pd.DataFrame({"recall": [0.25, 0.5], "n": [3, 4]}, index=pd.Index(["keyword", "dense"], name="system"))
    record("01_a", table)
    pd.testing.assert_frame_equal(frame(read(work, "01_a")["figures"]["main"]), table)
    counted = pd.DataFrame({"a": ["x", "y"]})
    record("01_a", {"other": counted})
    pd.testing.assert_frame_equal(frame(read(work, "01_a")["figures"]["other"]), counted)


@pytest.mark.parametrize("lesson, figures, message", [
    ("lesson one", {"x": 1}, "lesson is 'lesson one'; expected a notebook's name"),
    ("../01_a", {"x": 1}, "lesson is"), ("01_a", {"a/b": 1}, "cannot be called"), ("01_a", {3: 1}, "cannot be called"),
    ("01_a", {"x": object()}, "a figure is of type object; expected a number")])
def test_what_cannot_be_recorded_is_refused(work, lesson, figures, message):
    with pytest.raises(ValueError, match=message):
        record(lesson, figures)
    assert not list(work.rglob("*.json"))


def test_missing_results_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="python course.py results"):
        load_results()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text('{"lessons": {"01_a": {"figures": {}}}}')
    assert load_results() == {"01_a": {"figures": {}}}


SCORES = pd.DataFrame({"recall": [0.5, 0.75, np.nan], "latency [ms]": [3.0, 9.0, 1.0], "note": ["<a>", None, "c"]},
                      index=pd.Index(["keyword", "dense", "none"], name="system"))


def test_the_best_of_each_column_is_marked_in_html_and_text():
    table = Table(SCORES, "Found & read", {"recall": "max", "latency [ms]": "min"}, digits=2, banner="mode tiny")
    page = table._repr_html_()
    assert page.count("<b>") == 2 and "<b>0.75</b>" in page and "<b>1.00</b>" in page
    assert "&lt;a&gt;" in page and "Found &amp; read" in page and "mode tiny" in page and "<td>–</td>" in page
    text = repr(table)
    assert "*0.75 " in text and "*1.00 " in text and text.endswith("mode tiny")
    assert len({len(line) for line in text.splitlines()[2:7]}) == 1, "columns are aligned"


def test_one_wish_holds_for_all_columns_and_ties_are_all_best():
    page = Table(pd.DataFrame({"a": [1, 1, 0], "b": [True, False, True]}), best="max").html()
    assert page.count("<b>1</b>") == 2 and page.count("<b>") == 2
    assert "<b>" not in Table(pd.DataFrame({"a": [1]}), best="max").html(), "one row has no best"
    assert "<b>" not in Table(SCORES).html()


def test_intervals_count_by_their_mean_and_numpy_numbers_count():
    intervals = pd.DataFrame({"recall": [Interval(0.5, 0.4, 0.6), Interval(0.7, 0.1, 0.9)]})
    assert "<b>0.700 [0.100, 0.900]</b>" in Table(intervals, best="max").html()
    mixed = pd.DataFrame({"x": [np.float32(0.25), {"mean": 0.5, "low": 0.0, "high": 1.0}, "none"]}, dtype=object)
    assert "<b>0.50 [0.00, 1.00]</b>" in Table(mixed, best="max", digits=2).html()


@pytest.mark.parametrize("best", ["highest", {"recall": "top"}, {"recal": "max"}])
def test_a_wrong_wish_is_refused(best):
    with pytest.raises(ValueError, match="best"):
        Table(SCORES, best=best)


def test_outside_a_notebook_words_and_tables_are_printed_as_text(capsys):
    say(f"Dense search finds **{0.5:.0%}**.")
    show_table(SCORES, "A caption", best="max")
    out = capsys.readouterr().out
    assert "Dense search finds **50%**." in out
    assert "A caption" in out and "*0.750" in out and f"mode {settings.mode}" in out
