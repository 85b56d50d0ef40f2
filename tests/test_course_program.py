"""course.py: set-up only when needed, notebooks in order, failures named, figures gathered, README filled in."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import course
from course import Place, Problem

ROOT = Path(course.__file__).resolve().parent


def notebook(path: Path, *cells: str) -> Path:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A lesson")]
                                    + [nbformat.v4.new_code_cell(source) for source in cells])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


def recording(name: str, value: float) -> str:
    """A cell that leaves a record as utils.report.record does."""
    record = {"lesson": name, "banner": "mode tiny · test", "figures": {"value": value}}
    return (f"import json, os, pathlib\nfolder = pathlib.Path(os.environ['COURSE_WORK']) / 'results'\n"
            f"folder.mkdir(parents=True, exist_ok=True)\n(folder / '{name}.json').write_text('{json.dumps(record)}')")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / ".work"))
    (tmp_path / "requirements.txt").write_text("numpy==1\n")
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "part.py").write_text("x = 1\n")
    return Place(tmp_path)


# -- set-up ------------------------------------------------------------------------------------------------------------
def make_fake_environment(place: Place) -> None:
    place.python.parent.mkdir(parents=True)
    place.python.write_text("")
    (place.venv / "course.stamp").write_text(course.stamp(place))


def test_setup_does_nothing_when_the_stamp_is_current(place, monkeypatch):
    make_fake_environment(place)
    monkeypatch.setattr(subprocess, "call", lambda *a, **k: pytest.fail("setup called a program"))
    course.setup(place)


def test_the_stamp_changes_with_the_requirements_but_not_with_line_ends(place):
    before = course.stamp(place)
    place.requirements.write_bytes(b"numpy==1\r\n")
    assert course.stamp(place) == before
    place.requirements.write_text("numpy==2\n")
    assert course.stamp(place) != before


@pytest.mark.parametrize("broken", ["no python", "no stamp", "other requirements"])
def test_an_environment_that_is_not_whole_is_not_taken_for_ready(place, broken):
    make_fake_environment(place)
    assert course.is_set_up(place)
    if broken == "no python":
        place.python.unlink()
    elif broken == "no stamp":
        (place.venv / "course.stamp").unlink()
    else:
        place.requirements.write_text("numpy==2\n")
    assert not course.is_set_up(place)


def test_a_failed_installation_leaves_no_stamp(place, monkeypatch):
    calls = []

    def call(command, **kwargs):
        calls.append(command[1:3] if command[1] == "-m" else command)
        return 1 if "install" in command else 0

    monkeypatch.setattr(subprocess, "call", call)
    with pytest.raises(Problem, match="installation failed"):
        course.setup(place)
    assert calls == [["-m", "venv"], ["-m", "pip"]]
    assert not course.is_set_up(place)


def test_an_unfit_python_is_named_with_what_fits(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(course.shutil, "which", lambda name: None)
    with pytest.raises(Problem, match=r"needs one of 3\.11, 3\.12, 3\.13"):
        course.fitting_python()
    monkeypatch.setattr(course.shutil, "which", lambda name: f"/bin/{name}" if name == "python3.12" else None)
    assert course.fitting_python() == "/bin/python3.12"


def test_the_program_can_be_read_by_an_old_python():
    ast.parse((ROOT / "course.py").read_text(encoding="utf-8"), feature_version=(3, 8))


def test_the_program_needs_only_the_standard_library_before_the_environment_is_there():
    command = [sys.executable, "-I", "-S", str(ROOT / "course.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "python course.py setup" in done.stdout


# -- requirements ------------------------------------------------------------------------------------------------------
def imported_by(path: Path) -> set[str]:
    """Top-level modules imported by a program or by a notebook's code cells."""
    if path.suffix == ".ipynb":
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        text = re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(cells), flags=re.MULTILINE)
    else:
        text = path.read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_imported_package_is_pinned():
    pins = {line.split("==")[0].lower() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
            if "==" in line}
    files = [ROOT / "course.py", *(p for folder in ("utils", "data", "tests", "notebooks")
                                   for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".ipynb"))]
    here = {"utils", "data", "course", "tests"} | {p.stem for p in files} | {p.parent.name for p in files}
    packages = importlib.metadata.packages_distributions()
    unpinned = {}
    for path in files:
        for name in imported_by(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in here or top == "google":  # google.colab exists in Colab only
                continue
            owners = {owner.lower().replace("_", "-") for owner in packages.get(top, [])}
            if not owners & pins:
                unpinned.setdefault(top, path.name)
    assert not unpinned, f"imported but not in requirements.txt: {unpinned}"


def test_every_requirement_is_pinned_exactly():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        assert not text or len(text.split("==")) == 2, f"not pinned exactly: {line}"


# -- notebooks ---------------------------------------------------------------------------------------------------------
def test_lessons_come_in_order_and_only_numbered_ones(place):
    for name in ("02_b", "00_start", "10_z", "scratch", "01_a"):
        notebook(place.notebooks / f"{name}.ipynb")
    notebook(place.notebooks / "exercises" / "01_x.ipynb")
    assert [p.stem for p in place.lessons()] == ["00_start", "01_a", "02_b", "10_z"]


def test_a_course_without_notebooks_says_what_to_do(place):
    with pytest.raises(Problem, match="git checkout -- notebooks"):
        place.lessons()


def test_a_notebook_runs_in_this_python_and_in_its_folder(place):
    source = notebook(place.notebooks / "00_a.ipynb",
                      "import sys, os\nprint(sys.executable)\nprint(os.getcwd())", "1 + 1")
    seen = []
    copy = place.work / "executed" / "00_a.ipynb"
    assert course.execute(source, copy, lambda done, cells: seen.append((done, cells))) == 2
    assert seen == [(0, 2), (1, 2)]
    cells = nbformat.read(copy, as_version=4).cells
    executable, folder = cells[1].outputs[0].text.split("\n")[:2]
    assert Path(executable) == Path(sys.executable) and Path(folder) == place.notebooks
    assert cells[2].outputs[0].data["text/plain"] == "2"
    assert not nbformat.read(source, as_version=4).cells[1].outputs, "the notebook itself must stay as it is"


def test_a_failing_notebook_is_named_with_its_cell_and_error(place, capsys):
    notebook(place.notebooks / "00_good.ipynb", recording("00_good", 1.5))
    notebook(place.notebooks / "01_bad.ipynb", "x = 1", "raise ValueError('what was expected')", "print('never')")
    notebook(place.notebooks / "02_after.ipynb", "1")
    with pytest.raises(Problem) as caught:
        course.run_lessons(place, reuse=False, expected={})
    message = str(caught.value)
    assert "01_bad.ipynb failed in code cell 2 of 3" in message
    assert "raise ValueError('what was expected')" in message and "ValueError: what was expected" in message
    assert (place.work / "executed" / "01_bad.ipynb").exists()
    assert not (place.work / "executed" / "02_after.ipynb").exists()
    assert "[1/3] 00_good … 1 cells in 0." in capsys.readouterr().out


def test_results_are_gathered_kept_while_unchanged_and_run_again_when_not(place, capsys):
    notebook(place.notebooks / "00_a.ipynb", recording("00_a", 1.5))
    second = notebook(place.notebooks / "01_b.ipynb", "print('records nothing')")
    course.run_lessons(place, reuse=True, expected={"00_a": 2.0}, gflops=100.0)
    assert "[1/2] 00_a (about 2.0 min) … " in capsys.readouterr().out
    results = course.collect(place)
    assert list(results["lessons"]) == ["00_a", "01_b"]
    assert results["lessons"]["00_a"]["figures"] == {"value": 1.5}
    run = results["lessons"]["01_b"]["run"]
    assert run["cells"] == 1 and run["minutes"] >= 0 and run["gflops"] == 100.0

    course.run_lessons(place, reuse=True, expected={})
    assert capsys.readouterr().out.count("unchanged") == 2

    notebook(second, "print('changed')")
    with pytest.raises(Problem, match="01_b.ipynb has no current results"):
        course.collect(place)
    course.run_lessons(place, reuse=True, expected={})
    assert "00_a: unchanged" in capsys.readouterr().out
    course.collect(place)


def test_a_clone_with_current_committed_results_runs_nothing(place, capsys):
    lesson = notebook(place.notebooks / "00_a.ipynb", "raise SystemExit('must not run')")
    record = {"figures": {}, "run": {"inputs": course.inputs_hash(place, lesson), "minutes": 1.0}}
    course.write(place.results, json.dumps({"lessons": {"00_a": record}}))
    course.run_lessons(place, reuse=True, expected={})
    assert course.collect(place)["lessons"] == {"00_a": record}


def test_inputs_are_cells_utils_data_requirements_and_settings_but_not_outputs(place, monkeypatch):
    lesson = notebook(place.notebooks / "00_a.ipynb", "1 + 1")
    last = course.inputs_hash(place, lesson)

    def changed() -> bool:
        nonlocal last
        before, last = last, course.inputs_hash(place, lesson)
        return before != last

    book = nbformat.read(lesson, as_version=4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(book, lesson)
    course.write(place.results, "{}")
    course.write(place.root / "data" / "build" / "make.py", "1")
    course.write(place.root / "data" / "README.md", "a card")
    assert not changed()
    (place.root / "utils" / "part.py").write_text("x = 2\n")
    assert changed()
    course.write(place.root / "data" / "questions" / "q.jsonl", "{}")
    assert changed()
    place.requirements.write_text("numpy==2\n")
    assert changed()
    monkeypatch.setenv("COURSE_SEED", "7")
    assert changed()


def test_a_damaged_record_is_named(place):
    course.write(place.results, "{ half")
    with pytest.raises(Problem, match="results.json is damaged .* Delete it"):
        course.read_json(place.results)


# -- figures in README.md ----------------------------------------------------------------------------------------------
RESULTS = {"lessons": {
    "01_a": {"banner": "b", "run": {"minutes": 2.25}, "figures": {
        "recall@5": {"mean": 0.7123, "low": 0.68, "high": 0.74}, "share": 0.4, "n": 1800, "name": "hybrid",
        "main": {"columns": ["recall"], "index": ["dense", "a|b"], "index_name": "system", "data": [[0.5], [None]]}}},
    "02_b": {"run": {"minutes": 1.5}, "figures": {}}}}


@pytest.mark.parametrize("marker, text", [
    ("01_a/run/minutes as .1f", "2.2"), ("01_a/figures/n", "1800"), ("01_a/figures/share as .0%", "40%"),
    ("01_a/figures/share", "0.400"), ("01_a/figures/recall@5 as .2f", "0.71 [0.68, 0.74]"),
    ("01_a/figures/name", "hybrid"), ("all/minutes as .1f", "3.8"), ("09_z/run/minutes as .1f", course.NOT_MEASURED)])
def test_numbers_in_a_text_come_from_the_results(marker, text):
    start = f"before <!-- results:{marker} -->old<!-- /results --> after"
    filled = course.fill(start, RESULTS)
    assert filled == f"before <!-- results:{marker} -->{text}<!-- /results --> after"
    assert course.fill(filled, RESULTS) == filled


def test_a_table_in_a_text_comes_from_the_results():
    filled = course.fill("<!-- results:01_a/figures/main -->\n<!-- /results -->", RESULTS)
    assert filled.splitlines()[1:-1] == ["| system | recall |", "| --- | --: |", "| dense | 0.500 |", "| a\\|b | – |"]


def test_a_number_that_is_in_no_result_is_an_error():
    with pytest.raises(Problem, match="'recal' is not there; there is: recall@5"):
        course.fill("<!-- results:01_a/figures/recal --><!-- /results -->", RESULTS)


def test_nothing_measured_leaves_dashes():
    assert course.fill("<!-- results:all/minutes as .1f -->9<!-- /results -->", {}) == \
        "<!-- results:all/minutes as .1f -->–<!-- /results -->"


# -- report ------------------------------------------------------------------------------------------------------------
def test_the_report_shows_figures_escapes_them_and_links_the_notebooks(place):
    lesson = notebook(place.notebooks / "01_semantic_search.ipynb", "1 + 1")
    course.execute(lesson, place.work / "executed" / lesson.name)
    record = {"lesson": lesson.stem, "banner": "mode tiny · <b>", "run": {"minutes": 1.25},
              "figures": {"share <i>": 0.25, "main": RESULTS["lessons"]["01_a"]["figures"]["main"]}}
    course.write(place.work / "results" / f"{lesson.stem}.json", json.dumps(record))
    page = course.write_report(place).read_text(encoding="utf-8")
    assert "href='executed/01_semantic_search.html'" in page
    assert (place.work / "executed" / "01_semantic_search.html").exists()
    assert "share &lt;i&gt;" in page and "mode tiny · &lt;b&gt;" in page and "<td>0.500</td>" in page
    closing = course.main_table(place)
    assert closing.startswith("01_semantic_search\n") and "dense" in closing and closing.endswith("mode tiny · <b>")


# -- command line ------------------------------------------------------------------------------------------------------
def test_tests_run_both_halves_and_report_the_failure(place, monkeypatch):
    notebook(place.notebooks / "00_a.ipynb")
    notebook(place.notebooks / "solutions" / "01_s.ipynb")
    commands, codes = [], iter([5, 0])

    def call(command, **kwargs):
        commands.append(command)
        return next(codes)

    monkeypatch.setattr(subprocess, "call", call)
    assert course.test(place, "python", ["-x"]) == 5
    assert commands[0][-2:] == ["tests", "-x"]
    assert [Path(p).as_posix() for p in commands[1][3:]] == ["notebooks/00_a.ipynb", "notebooks/solutions/01_s.ipynb"]


def test_a_wrong_command_line_is_refused(capsys):
    for arguments in (["dance"], ["course", "--fast"]):
        with pytest.raises(SystemExit) as stopped:
            course.main(arguments)
        assert stopped.value.code == 2


def test_a_problem_ends_the_program_with_its_message_and_code_1(monkeypatch, capsys):
    def fail(place):
        raise Problem("what happened, and what to do")

    monkeypatch.setattr(course, "setup", fail)
    assert course.main(["setup"]) == 1
    assert "what happened, and what to do" in capsys.readouterr().err
