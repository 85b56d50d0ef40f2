"""Results to readers: figures kept in files, tables with a banner, and sentences whose numbers no one typed.

A notebook calls `record()` with what it found; `python course.py results` gathers the records in
data/results/results.json, from which README.md takes its numbers.
"""

from __future__ import annotations

import dataclasses
import datetime
import html
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from .settings import DATA, WORK, banner, settings

__all__ = ["Table", "checkpoint", "experiment", "frame", "load_results", "record", "say", "show_table"]

_LESSON = re.compile(r"\d\d_[a-z0-9_]+")
_PACKAGES = ("torch", "transformers", "peft", "sentence-transformers", "faiss-cpu", "llama-index-core", "numpy")


# -- figures in files --------------------------------------------------------------------------------------------------
def record(lesson: str, figures: Mapping[str, Any] | pd.DataFrame, seeds: tuple[int, ...] | None = None) -> None:
    """Add a lesson's figures to `WORK/results/<lesson>.json`, with mode, models, seeds, date, hardware and versions.

    A second call adds to the first; figures found with another mode, model or seed are thrown away.

    Parameters
    ----------
    lesson : the notebook's name without .ipynb ("01_semantic_search").
    figures : name to number, text, list, `Interval` or DataFrame; one DataFrame alone is the table "main".
    seeds : the training or sampling seeds behind the figures (default: `settings.seed`).

    Raises
    ------
    ValueError : the lesson's name is none, or a name or value cannot be kept.
    """
    if not _LESSON.fullmatch(lesson):
        raise ValueError(f"lesson is '{lesson}'; expected a notebook's name without .ipynb: 01_semantic_search")
    figures = {"main": figures} if isinstance(figures, pd.DataFrame) else figures
    if wrong := [name for name in figures if not isinstance(name, str) or re.search(r"[/<>]| as ", name)]:
        raise ValueError(f"figures cannot be called {wrong}; a name is a text without '/', '<', '>' and ' as '")
    line = banner(seeds)
    setup = {"mode": settings.mode, "llm": settings.llm, "embedder": settings.embedder,
             "seeds": list(seeds or (settings.seed,)), "hardware": line.rsplit(" · ", 1)[-1]}
    path = WORK / "results" / f"{lesson}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = old.get("figures", {}) if all(old.get(key) == value for key, value in setup.items()) else {}
    content = {"lesson": lesson, "banner": line, **setup, "date": f"{datetime.date.today():%Y-%m-%d}",
               "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
               "figures": {**kept, **{name: _plain(value) for name, value in figures.items()}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def load_results() -> dict[str, dict]:
    """The committed results, by lesson. Raises FileNotFoundError with the remedy."""
    path = DATA / "results" / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: nothing was measured yet. Do: python course.py results")
    return json.loads(path.read_text(encoding="utf-8"))["lessons"]


def frame(table: Mapping[str, Any]) -> pd.DataFrame:
    """The DataFrame that was recorded as `table`."""
    index = table.get("index")
    return pd.DataFrame(table["data"], columns=table["columns"],
                        index=None if index is None else pd.Index(index, name=table.get("index_name")))


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it. NaN becomes null, a DataFrame {columns, index, index_name, data}."""
    if isinstance(value, pd.DataFrame):
        counted = isinstance(value.index, pd.RangeIndex)
        return {"columns": [str(column) for column in value.columns], "index_name": value.index.name,
                "index": None if counted else [str(label) for label in value.index],
                "data": [[_plain(cell) for cell in row] for row in value.itertuples(index=False, name=None)]}
    if isinstance(value, pd.Series):
        return {str(key): _plain(cell) for key, cell in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(cell) for key, cell in value.items()}
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(cell) for cell in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a figure is of type {type(value).__name__}; expected a number, text, list, dict, dataclass or "
                     "DataFrame")


# -- words and tables on the screen ------------------------------------------------------------------------------------
class _Words(Markdown):
    """Markdown that reads as text where it is not rendered."""

    def __repr__(self) -> str:
        return self.data


def say(text: str) -> None:
    """Show a Markdown text made by code: `say(f"Dense search finds {recall:.0%} …")`, so that no number is typed."""
    display(_Words(text))


@dataclasses.dataclass(frozen=True)
class Table:
    """A DataFrame with its caption and banner, best values marked; HTML in a notebook, text in a terminal.

    The parameters are those of `show_table`.
    """

    frame: pd.DataFrame
    caption: str = ""
    best: str | Mapping[str, str] | None = None
    digits: int = 3
    banner: str = ""

    def __post_init__(self) -> None:
        wishes = self.best.values() if isinstance(self.best, Mapping) else [self.best]
        if any(wish not in ("max", "min", None) for wish in wishes):
            raise ValueError(f"best is {self.best!r}; expected 'max', 'min', None, or one of them by column")
        if isinstance(self.best, Mapping) and (unknown := [c for c in self.best if c not in self.frame.columns]):
            raise ValueError(f"best names {unknown}; the table's columns are {list(self.frame.columns)}")

    def _text(self, value: Any) -> str:
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):  # an interval that was recorded
            return f"{self._text(value['mean'])} [{self._text(value['low'])}, {self._text(value['high'])}]"
        if isinstance(value, (float, np.floating)):
            return "–" if np.isnan(value) else f"{value:.{self.digits}f}"
        return "–" if value is None else str(value)

    def _column(self, name: str, mark: str, escape: Callable[[str], str]) -> list[str]:
        """The cells of a column as texts, `mark` put around the best ("<b>{}</b>")."""
        values = list(self.frame[name])
        wish = self.best.get(name) if isinstance(self.best, Mapping) else self.best
        numbers = [_number(value) for value in values]
        there = [number for number in numbers if number is not None]
        best = {"max": max, "min": min}[wish](there) if wish and len(there) > 1 else None
        return [mark.format(escape(self._text(value))) if best is not None and number == best
                else escape(self._text(value)) for value, number in zip(values, numbers)]

    def _rows(self, mark: str, escape: Callable[[str], str] = str) -> list[list[str]]:
        """Header and rows as texts, with the index as first column unless it only counts."""
        columns = [[escape(str(name)), *self._column(name, mark, escape)] for name in self.frame.columns]
        if not isinstance(self.frame.index, pd.RangeIndex):
            labels = [self.frame.index.name or "", *self.frame.index]
            columns.insert(0, [escape(str(label)) for label in labels])
        return [list(row) for row in zip(*columns)]

    def __repr__(self) -> str:
        rows = self._rows("*{}")
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])])
                 for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        note = ["* the best of its column"] if self.best else []
        return "\n".join([self.caption, "", *lines, *note, self.banner])

    def markdown(self) -> str:
        """As a Markdown table, without caption and banner."""
        rows = self._rows("**{}**", lambda text: text.replace("|", "\\|"))
        rows.insert(1, ["---"] + ["--:"] * (len(rows[0]) - 1))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def html(self) -> str:
        """As an HTML table with caption and banner; texts are escaped."""
        header, *body = self._rows("<b>{}</b>", html.escape)
        lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        return (f"<table><caption>{html.escape(self.caption)}</caption><thead><tr>"
                + "".join(f"<th scope='col'>{name}</th>" for name in header) + "</tr></thead><tbody>"
                + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody></table>"
                + (f"<p><small>{html.escape(self.banner)}</small></p>" if self.banner else ""))

    _repr_html_ = html


def _number(value: Any) -> float | None:
    """What a cell counts as when the best is sought: a number, the mean of an interval, or None."""
    if not pd.api.types.is_number(value):
        value = value.get("mean") if isinstance(value, Mapping) else getattr(value, "mean", None)
    return value if pd.api.types.is_number(value) and not isinstance(value, bool) and not np.isnan(value) else None


def show_table(table: pd.DataFrame, caption: str, best: str | Mapping[str, str] | None = None, digits: int = 3,
               seeds: tuple[int, ...] | None = None) -> None:
    """Show a table with its banner underneath. Put the unit into the column's name ("latency [ms]").

    Parameters
    ----------
    best : "max" or "min" marks the best value of every column of numbers; a dict says it by column; None marks nothing.
    digits : decimals of numbers; texts and intervals are shown as they are.
    seeds : seeds behind the numbers, for the banner.
    """
    display(Table(table, caption, best, digits, banner(seeds)))


def checkpoint(question: str, choices: Mapping[str, str]) -> None:
    """Ask the reader: each choice opens to what is right or wrong about it. Works without widgets, also on a web page."""
    rows = "".join(f"<details style='margin:2px 0 2px 1em'><summary>{html.escape(choice)}</summary>"
                   f"<p style='margin:2px 0 6px 1.2em'>{html.escape(why)}</p></details>" for choice, why in choices.items())
    text = "\n".join([question, *(f"  ( ) {choice}: {why}" for choice, why in choices.items())])
    display({"text/html": f"<div><b>{html.escape(question)}</b>{rows}</div>", "text/plain": text}, raw=True)


def experiment(name: str) -> pd.DataFrame:
    """A table that `python -m data.build.experiments` measured (several training seeds, minutes of work), from
    data/experiments; its banner is in `.attrs["banner"]`. Raises FileNotFoundError with the remedy."""
    path = DATA / "experiments" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. It is part of the repository (git checkout -- data/experiments) and is made "
                                "anew by: python course.py results")
    content = json.loads(path.read_text(encoding="utf-8"))
    table = pd.DataFrame(content["rows"], columns=content["columns"])
    table.attrs.update(banner=content["banner"], seeds=content["seeds"])
    return table
