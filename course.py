"""One program for the whole course. It needs nothing but Python 3.11, 3.12 or 3.13; the rest it installs into .venv.

    python course.py setup      make .venv and install the pinned requirements, unless that is done already
    python course.py doctor     what this machine has, what is wrong and how to mend it, minutes per notebook
    python course.py lab        JupyterLab on the first notebook
    python course.py course     run every notebook from top to bottom; main table and .work/report.html at the end
    python course.py test       all tests: unit, property, and the notebooks' checked outputs
    python course.py results    like course, then write data/results/results.json and the numbers in README.md

With --here it installs nothing and uses the Python that runs it (a conda environment, for example). What follows `lab`
or `test` is handed on to JupyterLab or pytest. After the installation no command needs a network.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PYTHONS = ((3, 11), (3, 12), (3, 13))
COMMANDS = ("setup", "doctor", "lab", "course", "test", "results")
#: the lesson whose table "main" closes a run: the first of these that has one
MAIN_TABLES = ("04_side_by_side", "01_semantic_search")
#: a result in README.md: <!-- results:NAME as FORMAT -->text<!-- /results -->, where "as FORMAT" may be left out
MARKER = re.compile(r"(<!-- results:([^>]+?)(?: as ([^\s>]+))? -->)(.*?)(<!-- /results -->)", re.DOTALL)
NOT_MEASURED = "–"


class Problem(Exception):
    """Something that the user must know: what happened, and what to do. Shown without a traceback."""


@dataclass(frozen=True)
class Place:
    """Where the course lies."""

    root: Path

    @property
    def requirements(self) -> Path:
        return self.root / "requirements.txt"

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def work(self) -> Path:
        return Path(os.environ.get("COURSE_WORK", self.root / ".work")).expanduser().resolve()

    @property
    def results(self) -> Path:
        return self.root / "data" / "results" / "results.json"

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """The Python of .venv."""
        return self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def lessons(self) -> list[Path]:
        """The numbered notebooks, in order. Raises Problem when there is none."""
        found = sorted(self.notebooks.glob("[0-9][0-9]_*.ipynb"))
        if not found:
            raise Problem(f"{self.notebooks} holds no numbered notebook (00_….ipynb). Do: git checkout -- notebooks")
        return found


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """A JSON object, {} when there is no such file. Raises Problem that names a damaged file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Problem(f"{path} is damaged ({error}). Delete it and run the same command again.") from error


# -- setup -------------------------------------------------------------------------------------------------------------
def stamp(place: Place) -> str:
    """What .venv must have been made for: the requirements (whatever their line ends) and the folder it stands in."""
    text = "\n".join(place.requirements.read_text(encoding="utf-8").splitlines())
    return hashlib.sha256(f"{place.root}\n{text}".encode()).hexdigest()


def is_set_up(place: Place) -> bool:
    """Whether .venv is there and made for these requirements."""
    mark = place.venv / "course.stamp"
    return place.python.exists() and mark.exists() and mark.read_text(encoding="utf-8") == stamp(place)


def fitting_python() -> str:
    """A Python of the right version: this one, or another on the PATH. Raises Problem when there is none."""
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    for major, minor in reversed(PYTHONS):
        if shutil.which(f"python{major}.{minor}"):
            return str(shutil.which(f"python{major}.{minor}"))
    wanted = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    raise Problem(f"This is Python {sys.version.split()[0]}; the course needs one of {wanted}. Install one from "
                  "python.org or with your package manager, and run the same command with it.")


def has_pip(place: Place) -> bool:
    """Whether .venv is whole enough to install into (its making may have been interrupted)."""
    return place.python.exists() and not subprocess.call([str(place.python), "-m", "pip", "--version"],
                                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def setup(place: Place) -> None:
    """Make .venv and install the pinned requirements; does nothing, and needs no network, when that is done already."""
    if is_set_up(place):
        return
    if not has_pip(place):
        base = fitting_python()
        print(f"Making the environment .venv with {base} …", flush=True)
        if subprocess.call([base, "-m", "venv", "--clear", str(place.venv)]):
            raise Problem("Python could not make .venv (see above). Debian and Ubuntu: sudo apt install python3-venv")
    print("Installing the packages of requirements.txt into .venv; the first time this downloads them …", flush=True)
    pip = [str(place.python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(place.requirements)]
    if subprocess.call(pip if sys.stdout.isatty() else pip + ["-qq", "--progress-bar", "off"]):
        raise Problem("The installation failed (see above). It needs a network and a few GB of disk. Run the same "
                      "command again: what is there already is kept.")
    site = subprocess.run([str(place.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          capture_output=True, text=True, check=True).stdout.strip()
    write(Path(site) / "course.pth", f"{place.root}\n")  # so that a notebook finds utils in any editor
    write(place.venv / "course.stamp", stamp(place))
    print("The environment is ready.", flush=True)


def environment(place: Place) -> dict[str, str]:
    """Environment variables for everything that runs in the course's Python."""
    paths = [str(place.root)] + [p for p in [os.environ.get("PYTHONPATH")] if p]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1", "JUPYTER_PREFER_ENV_PATH": "1",
            "COURSE_MODE": os.environ.get("COURSE_MODE", "tiny"), "COURSE_WORK": str(place.work)}


# -- running notebooks (in the course's Python) ------------------------------------------------------------------------
def inputs_hash(place: Place, notebook: Path) -> str:
    """Fingerprint of what a notebook's figures depend on: its cells, utils, the data, requirements and settings."""
    digest = hashlib.sha256()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        digest.update(f"{cell['cell_type']}\n{''.join(cell['source'])}\0".encode())
    others = (place.root / "data" / "build", place.results.parent)
    files = [p for folder in ("utils", "data") for p in (place.root / folder).rglob("*")
             if p.is_file() and p.suffix not in (".pyc", ".part") and p.name != "README.md"
             and not any(other in p.parents for other in others)]
    for path in sorted(files) + [place.requirements]:
        digest.update(path.relative_to(place.root).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    for name in ("COURSE_MODE", "COURSE_LLM", "COURSE_EMBEDDER", "COURSE_SEED"):
        digest.update(f"{name}={os.environ.get(name, '')}\0".encode())
    return digest.hexdigest()


def execute(notebook: Path, copy: Path, on_cell=lambda done, cells: None) -> int:
    """Run a notebook from top to bottom in a fresh kernel of this Python and write the executed copy.

    Returns the number of code cells. Raises Problem with the notebook, the cell and the error when a cell fails; what
    ran until then is in the copy.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    book = nbformat.read(notebook, as_version=4)
    code = [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"]
    at = 0

    def started(cell, cell_index):
        nonlocal at
        if cell_index in code:
            at = code.index(cell_index)
            on_cell(at, len(code))

    client = NotebookClient(book, timeout=None, kernel_name="python3", on_cell_start=started,
                            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only: no notes amid the progress
                            resources={"metadata": {"path": str(notebook.parent)}})
    try:
        client.execute()
        return len(code)
    except CellExecutionError as error:
        what = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        what = ("Python died. Most often the memory ran out: close other programs and run the same command again. If "
                "it dies again: python course.py doctor")
    finally:
        write(copy, nbformat.writes(book))
    source = "\n".join("    " + line for line in book.cells[code[at]].source.splitlines())
    raise Problem(f"{notebook.name} failed in code cell {at + 1} of {len(code)}:\n\n{source}\n\n{what}\n\n"
                  f"The notebook as far as it ran: {copy}")


class ProgressLine:
    """One line a notebook: the cell it is in while it runs (on a terminal), minutes at the end."""

    def __init__(self, label: str, expected: float | None):
        self.begin, self.live = time.monotonic(), sys.stdout.isatty()
        self.head = label + (f" (about {max(expected, 0.1):.1f} min)" if expected else "") + " … "
        print(self.head, end="", flush=True)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.begin) / 60

    def cell(self, done: int, cells: int) -> None:
        if self.live:
            print(f"\r{self.head}cell {done + 1}/{cells}, {self.minutes:.1f} min ", end="", flush=True)

    def close(self, cells: int) -> None:
        print(f"\r{self.head}" if self.live else "", f"{cells} cells in {self.minutes:.1f} min    ", sep="", flush=True)


def run_lessons(place: Place, reuse: bool, expected: dict[str, float], gflops: float | None = None) -> None:
    """Run all notebooks in order; each leaves .work/executed/NAME.ipynb and its figures in .work/results/NAME.json.

    Parameters
    ----------
    reuse : keep a notebook's figures, without running it, where it and all it depends on are unchanged.
    expected : minutes to be expected, by notebook name.
    gflops : speed of this machine in GFLOP/s, recorded beside the minutes.
    """
    lessons = place.lessons()
    for number, notebook in enumerate(lessons, 1):
        name, label = notebook.stem, f"[{number}/{len(lessons)}] {notebook.stem}"
        inputs = inputs_hash(place, notebook)
        if reuse and recorded(place, name, inputs):
            print(f"{label}: unchanged, its figures are kept", flush=True)
            continue
        figures = place.work / "results" / f"{name}.json"
        figures.unlink(missing_ok=True)
        line = ProgressLine(label, expected.get(name))
        try:
            cells = execute(notebook, place.work / "executed" / notebook.name, line.cell)
        except BaseException:
            print(flush=True)
            raise
        line.close(cells)
        run = {"inputs": inputs, "minutes": round(line.minutes, 2), "cells": cells,
               "gflops": gflops and round(gflops, 1), "finished": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}
        record = read_json(figures) or {"lesson": name, "figures": {}}
        write(figures, json.dumps({**record, "run": run}, indent=1, ensure_ascii=False) + "\n")


def records(place: Place, name: str) -> list[dict]:
    """What is known of a lesson: its record in .work, then the one in the results file (those that there are)."""
    both = (read_json(place.work / "results" / f"{name}.json"), read_json(place.results).get("lessons", {}).get(name))
    return [record for record in both if record]


def recorded(place: Place, name: str, inputs: str) -> dict | None:
    """The record of a lesson that was run with these inputs, if any."""
    return next((r for r in records(place, name) if r.get("run", {}).get("inputs") == inputs), None)


# -- figures -----------------------------------------------------------------------------------------------------------
def collect(place: Place) -> dict:
    """The results of all lessons as one object. Raises Problem when one was not run with the present inputs."""
    lessons = {}
    for notebook in place.lessons():
        record = recorded(place, notebook.stem, inputs_hash(place, notebook))
        if record is None:
            raise Problem(f"{notebook.name} has no current results. Run: python course.py results")
        lessons[notebook.stem] = record
    return {"about": "Written by python course.py results, never by hand; the numbers in README.md come from here.",
            "lessons": lessons}


def show(value, spec: str = "") -> str:
    """A figure as text: numbers by `spec` (three decimals by default), an interval as "0.71 [0.68, 0.74]"."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
        return "{} [{}, {}]".format(*(show(value[k], spec) for k in ("mean", "low", "high")))
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, list):
        return ", ".join(show(v, spec) for v in value)
    return format(value, spec or (".3f" if isinstance(value, float) else ""))


def is_table(value) -> bool:
    return isinstance(value, dict) and {"columns", "data"} <= set(value)


def value_at(results: dict, name: str):
    """The figure called LESSON/KEY/KEY… (01_semantic_search/run/minutes); all/minutes is the sum over the lessons.

    None when the lesson was not measured yet. Raises Problem when it was but has no such figure.
    """
    lessons = results.get("lessons", {})
    if name == "all/minutes":
        return float(sum(record["run"]["minutes"] for record in lessons.values())) if lessons else None
    lesson, *keys = name.split("/")
    if lesson not in lessons:
        return None
    value = lessons[lesson]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(value) if isinstance(value, dict) else "nothing below"
            raise Problem(f"README.md names the result '{name}', but '{key}' is not there; there is: {there}")
        value = value[key]
    return value


def fill(text: str, results: dict) -> str:
    """`text` with what stands between <!-- results:NAME as FORMAT --> and <!-- /results --> taken from the results.

    A number is written by FORMAT, a recorded table as a Markdown table, what was not measured yet as a dash.
    """
    def replace(match: re.Match) -> str:
        value = value_at(results, match[2])
        if is_table(value):
            from utils.report import Table, frame
            return f"{match[1]}\n{Table(frame(value)).markdown()}\n{match[5]}"
        return match[1] + show(value, match[3] or "") + match[5]
    return MARKER.sub(replace, text)


def main_table(place: Place) -> str:
    """The table that closes a run, with its banner."""
    from utils.report import Table, frame

    for name in MAIN_TABLES:
        for record in records(place, name)[:1]:
            if is_table(record["figures"].get("main")):
                return repr(Table(frame(record["figures"]["main"]), name, banner=record["banner"]))
    return "No lesson has recorded a main table."


# -- report ------------------------------------------------------------------------------------------------------------
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .75rem;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child,caption{text-align:left}caption{font-weight:600}.banner{color:#555;font-size:.85rem}"""


def export_html(executed: Path, notebooks: Path) -> Path:
    """The executed notebook as one HTML file beside it; links to other notebooks lead to their HTML files."""
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.read(executed, as_version=4)
    body, _ = HTMLExporter(embed_images=True).from_notebook_node(
        book, resources={"metadata": {"path": str(notebooks), "name": executed.stem}})
    page = executed.with_suffix(".html")
    write(page, re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', body))
    return page


def write_report(place: Place) -> Path:
    """.work/report.html: each lesson's banner, figures and tables, and a link to the executed notebook."""
    from utils.report import Table, frame

    parts = ["<h1>RAG vs. fine-tuning, measured: what this machine found</h1>"]
    for notebook in place.lessons():
        record = (records(place, notebook.stem) or [{}])[0]
        executed = place.work / "executed" / notebook.name
        title = html.escape(notebook.stem.replace("_", " "))
        if executed.exists():
            page = export_html(executed, place.notebooks)
            title = f"<a href='{page.relative_to(place.work).as_posix()}'>{title}</a>"
        parts.append(f"<h2>{title}</h2><p class='banner'>{html.escape(record.get('banner', ''))}"
                     f" · {show(record.get('run', {}).get('minutes'), '.1f')} min</p>")
        figures = record.get("figures", {})
        single = [[key, show(value)] for key, value in figures.items() if not is_table(value)]
        tables = {"key figures": {"columns": ["figure", "value"], "data": single}} if single else {}
        tables.update((key, value) for key, value in figures.items() if is_table(value))
        parts += [Table(frame(value), key).html() for key, value in tables.items()]
    path = place.work / "report.html"
    write(path, "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
                "<title>RAG vs. fine-tuning, measured</title>"
                f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n")
    return path


# -- commands ----------------------------------------------------------------------------------------------------------
def course(place: Place, publish: bool) -> int:
    """The commands `course` and, with `publish`, `results`; runs in the course's Python."""
    from utils.doctor import check

    place.lessons()
    print("Looking at this machine …", flush=True)
    checkup = check()
    print(checkup.brief(), flush=True)
    if not checkup.ok:
        return 1
    run_lessons(place, reuse=publish, expected=checkup.expected_minutes, gflops=checkup.gflops)
    if publish:
        results, readme = collect(place), place.root / "README.md"
        write(place.results, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write(readme, fill(readme.read_text(encoding="utf-8"), results))
        print(f"Figures: {place.results}; the numbers in README.md are theirs now.")
    print(f"\n{main_table(place)}\n\nReport: {write_report(place)}", flush=True)
    return 0


def test(place: Place, python: str, extra: list[str]) -> int:
    """All tests, then the notebooks by nbval; both run even when the first fails."""
    print("Tests of the programs and data …", flush=True)
    codes = [subprocess.call([python, "-m", "pytest", "tests", *extra], cwd=place.root, env=environment(place))]
    print("The notebooks, cell by cell …", flush=True)
    books = place.lessons() + sorted((place.notebooks / "solutions").glob("*.ipynb"))
    codes.append(subprocess.call([python, "-m", "pytest", *(str(b.relative_to(place.root)) for b in books)],
                                 cwd=place.root, env=environment(place)))
    return next((code for code in codes if code), 0)


def lab(place: Place, python: str, extra: list[str]) -> int:
    """JupyterLab on the first notebook, without its own looking for news and updates."""
    return subprocess.call([python, "-m", "jupyterlab", str(place.lessons()[0]), f"--ServerApp.root_dir={place.root}",
                            "--LabApp.news_url=None",
                            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *extra],
                           cwd=place.root, env=environment(place))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, set up, do what was asked. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--here", action="store_true", help="use this Python as it is; make and install nothing")
    chosen, extra = parser.parse_known_args(arguments)
    if extra and chosen.command not in ("lab", "test"):
        parser.error(f"unknown: {' '.join(extra)}")
    place = Place(Path(__file__).resolve().parent)
    try:
        if chosen.here:
            python = sys.executable
        else:
            setup(place)
            python = str(place.python)
        if chosen.command == "setup":
            print("Everything is installed. Next: python course.py lab")
            return 0
        if chosen.command == "doctor":
            return subprocess.call([python, "-m", "utils.doctor"], cwd=place.root, env=environment(place))
        if chosen.command in ("lab", "test"):
            return (lab if chosen.command == "lab" else test)(place, python, extra)
        if not chosen.here:
            return subprocess.call([python, str(Path(__file__).resolve()), chosen.command, "--here"], cwd=place.root,
                                   env=environment(place))
        os.environ.update(environment(place))
        return course(place, publish=chosen.command == "results")
    except Problem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command starts again.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for _stream in (sys.stdout, sys.stderr):
        _stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main())
