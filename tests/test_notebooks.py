"""The committed notebooks as a reader meets them: whole, short-celled, executed in order, with nothing of anybody's machine.

Whether they run is nbval's business (`python course.py test`); nothing is executed here.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
EXERCISES = sorted((FOLDER / "exercises").glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/rag-vs-finetuning-measured/course/blob/main/notebooks/"
LONGEST_CELL = 30
#: folders of somebody's machine; a part of an address (https://…/home/) is none
MACHINE_PATH = re.compile(r"(?:file://|(?<![\w.:/-]))(?:/(?:work|home|root|Users|mnt|tmp|private|opt|content)/|[A-Za-z]:\\+Users\\)")


def name(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def prose(book: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


def output_texts(output: nbformat.NotebookNode) -> list[str]:
    """All that an output shows as text, whatever its kind; pictures are none."""
    parts = [output.get("text", ""), *output.get("data", {}).values()]
    pictures = {id(value) for kind, value in output.get("data", {}).items() if kind.startswith("image/") and "svg" not in kind}
    return [str(part) for part in parts if id(part) not in pictures]


@pytest.fixture(params=[*LESSONS, *EXERCISES, *SOLUTIONS], ids=name)
def path(request) -> Path:
    return request.param


@pytest.fixture(params=LESSONS, ids=name)
def lesson(request) -> Path:
    return request.param


# -- every notebook ----------------------------------------------------------------------------------------------------
def test_there_are_lessons():
    assert LESSONS, f"no notebook in {FOLDER}"


def test_a_notebook_is_valid_and_its_cells_have_names_of_their_own(path):
    book = read(path)
    nbformat.validate(book)
    assert book.nbformat == 4
    assert book.metadata.kernelspec.name == "python3"
    ids = [cell.get("id") for cell in book.cells]
    assert len(set(ids)) == len(ids)


def test_no_cell_is_longer_than_a_screen(path):
    long = {cell.source.splitlines()[0]: n for cell in code_cells(read(path))
            if (n := len(cell.source.splitlines())) > LONGEST_CELL}
    assert not long, f"first line of the cell, and its lines: {long}"


def test_no_code_cell_is_empty(path):
    assert all(cell.source.strip() for cell in code_cells(read(path)))


def test_no_output_is_an_error_or_a_warning_or_a_widget(path):
    for cell in code_cells(read(path)):
        for output in cell.outputs:
            what = f"in the cell that begins with {cell.source.splitlines()[0]!r}"
            assert output.output_type != "error", f"an error {what}: {output.get('evalue')}"
            assert output.get("name") != "stderr", f"stderr {what}: {output.text[:200]}"
            widgets = [kind for kind in output.get("data", {}) if "widget" in kind]
            assert not widgets, f"a widget, which shows nothing on a web page, {what}"


def test_no_output_names_a_folder_of_a_machine(path):
    for cell in code_cells(read(path)):
        for text in (text for output in cell.outputs for text in output_texts(output)):
            found = MACHINE_PATH.search(text)
            assert not found, f"{text[max(0, found.start() - 40): found.end() + 60]!r} in {cell.source.splitlines()[0]!r}"


@pytest.mark.parametrize("text, bad", [
    ("3.11 at /work/main/.venv/bin/python", True), ("saved in '/home/ada/x'", True), ("/root/.cache", True),
    ("C:\\Users\\ada", True), ("/tmp/x", True), ("file:///home/ada", True), ("https://example.org/home/page", False), (".work/report.html", False),
    ("half-time/work/life", False), ("the work/home balance", False)])
def test_the_search_for_such_folders_finds_them(text, bad):
    assert bool(MACHINE_PATH.search(text)) == bad


# -- lessons -----------------------------------------------------------------------------------------------------------
def test_a_lesson_begins_with_its_badges_and_what_the_learner_will_be_able_to_do(lesson):
    first = next(cell for cell in read(lesson).cells if cell.cell_type == "markdown").source
    assert first.startswith(f"# {lesson.stem[:2]} "), "the first line is '# NN · Title'"
    assert "What you will be able to do" in first
    badges = [line for line in first.splitlines() if "Open in Colab" in line]
    assert badges and f"({COLAB}{lesson.name})" in badges[0]
    assert "minutes" in badges[0] and "network:" in badges[0]


def test_a_lesson_sets_itself_up_in_colab_or_says_where_it_runs(lesson):
    book = read(lesson)
    bootstrap, first = code_cells(book)[0].source, book.cells[0].source
    assert ('"google.colab" in sys.modules' in bootstrap and "git clone" in bootstrap
            or re.search(r"\bruns (only )?(on|in|where)\b", first))


def test_a_lesson_ends_with_a_summary_and_three_exercises(lesson):
    text = prose(read(lesson))
    assert re.search(r"^## Summary and takeaways$", text, re.MULTILINE)
    exercises = re.search(r"^## Exercises$.*", text, re.MULTILINE | re.DOTALL)
    assert exercises
    assert all(f"**{level}" in exercises[0] for level in ("Easy", "Medium", "Hard"))


def test_a_lesson_has_exercises_and_solutions_which_it_names(lesson):
    text = prose(read(lesson))
    for folder in ("exercises", "solutions"):
        assert (FOLDER / folder / lesson.name).exists(), f"notebooks/{folder}/{lesson.name} is missing"
        assert f"{folder}/{lesson.name}" in text


def test_a_lesson_is_committed_as_it_ran_from_top_to_bottom(lesson):
    counts = [cell.execution_count for cell in code_cells(read(lesson))]
    assert None not in counts, f"code cell {counts.index(None) + 1} of {len(counts)} was not executed"
    assert counts == sorted(set(counts))


def test_every_figure_of_a_lesson_is_described_in_words(lesson):
    cells = read(lesson).cells
    for cell, following in zip(cells, [*cells[1:], nbformat.v4.new_markdown_cell()]):
        pictures = [o for o in cell.get("outputs", []) if any(kind.startswith("image/") for kind in o.get("data", {}))]
        if pictures:
            said = [text for output in cell.outputs for text in output_texts(output)]
            described = any("*Figure" in text for text in [*said, following.source if following.cell_type == "markdown" else ""])
            assert described, (f"the cell after {cell.source.splitlines()[0]!r} … needs one sentence '*Figure: …*' for readers "
                               "who do not see the picture")


# -- exercises and solutions -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", [*EXERCISES, *SOLUTIONS], ids=name)
def test_exercises_and_solutions_belong_to_a_lesson(other):
    assert other.name in {lesson.name for lesson in LESSONS}
    levels = re.findall(r"^#+ .*\b(Easy|Medium|Hard)\b", prose(read(other)), re.MULTILINE)
    assert levels == ["Easy", "Medium", "Hard"]


@pytest.mark.parametrize("exercises", EXERCISES, ids=name)
def test_an_exercise_begins_with_code_that_is_whole_and_leaves_places_to_fill_in(exercises):
    gaps = [len(re.findall(r"(?<!\.)\.\.\.(?!\.)", cell.source)) for cell in code_cells(read(exercises))]
    assert gaps[0] == 0 and sum(gaps) >= 3


@pytest.mark.parametrize("solution", SOLUTIONS, ids=name)
def test_a_solution_is_committed_as_it_ran(solution):
    cells = code_cells(read(solution))
    counts = [cell.execution_count for cell in cells]
    assert None not in counts and counts == sorted(set(counts))
    assert any(cell.outputs for cell in cells)
