"""What lesson 04 adds to utils, and the two parts of the lesson that must hold whatever is measured: what was planned stands before
what was measured, and nothing that a document or a model says becomes HTML."""

from __future__ import annotations

import ast
import html
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from utils.evaluation import load_facts, load_items, load_questions, peak_memory_mb, raft_sample, triage_question
from utils.settings import COLOURS

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
LESSON = next(path for folder in (NOTEBOOKS, NOTEBOOKS / "drafts") if (path := folder / "04_side_by_side.ipynb").exists())
ATTACK = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture(scope="module")
def cells() -> list[str]:
    return [cell.source for cell in nbformat.read(LESSON, as_version=4).cells if cell.cell_type == "code"]


def first(cells: list[str], text: str) -> int:
    return next(n for n, source in enumerate(cells) if text in source)


# -- utils -------------------------------------------------------------------------------------------------------------
def test_peak_memory_is_that_of_a_python_process_and_never_falls():
    before = peak_memory_mb()
    block = bytearray(60_000_000)
    block[::4096] = b"x" * len(block[::4096])  # touch every page
    during = peak_memory_mb()
    del block
    assert 20 < before <= during <= peak_memory_mb()
    assert during < 1_000_000  # MB, not bytes or KiB


def test_the_systems_of_the_lesson_have_colours_of_their_own():
    systems = ("base", "RAG", "fine-tuned", "both", "RAFT", "oracle", "shuffled")
    assert len({COLOURS[s] for s in systems}) == len(systems)


def test_the_embedder_knows_its_size():
    from utils.embedding import CourseEmbedding

    assert 20_000_000 < CourseEmbedding(cache=False).parameters < 25_000_000


def test_a_raft_sample_uses_only_what_training_may_ask_and_spreads_over_facts():
    facts, questions = load_facts("2026-04-01"), load_questions("train", "2026-04-01")
    sample = raft_sample(facts, questions, n=600)
    assert len(sample) == len({q.id for q in sample}) == 600
    assert all(facts[q.fact].asked and q.split == "train" for q in sample)
    counts = [sum(q.fact == fact.id for q in sample) for fact in facts.values() if fact.asked]
    assert max(counts) - min(counts) <= 1
    assert sample == raft_sample(facts, questions, n=600) != raft_sample(facts, questions, n=600, seed=1)


def test_a_ticket_is_known_by_its_words_alone():
    start = triage_question("").strip()
    assert all((i.kind == "triage") == i.text.startswith(start) for i in load_items())


# -- the lesson --------------------------------------------------------------------------------------------------------
def test_the_comparisons_are_fixed_before_anything_is_trained_or_answered(cells):
    planned = first(cells, "PLANNED = ")
    for later in ("tuned(", "answer_all(llm, hits)", "mcnemar("):
        assert planned < first(cells, later)
    assert sum("PLANNED =" in source or "PLANNED +=" in source for source in cells) == 1


def page_function(cells: list[str], **names):
    """The lesson's `page`, with stand-ins for what it calls."""
    tree = ast.parse(next(source for source in cells if "def page(" in source))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "page"]
    space = {"html": html, "COLOURS": COLOURS, "FOUR": ("base", "RAG", "fine-tuned", "both"), **names}
    exec(compile(tree, "page", "exec"), space)
    return space["page"]


def test_the_panel_shows_html_of_documents_answers_and_questions_as_text(cells):
    node = SimpleNamespace(metadata={"title": ATTACK}, text=ATTACK)
    answer = SimpleNamespace(text=ATTACK, generation=SimpleNamespace(prompt_tokens=7))
    page = page_function(cells, retrieve=lambda question: [SimpleNamespace(node=node)],
                         ask=lambda name, question, hits=None: (answer, 0.012), right_answers={ATTACK: ATTACK})(ATTACK)
    assert "<script" not in page and "alert(&#x27;x&#x27;)" in page
    assert page.count(html.escape(ATTACK)) == 1 + 4 + 1 + 2  # question, four answers, the right one, a title and its text
    assert all(f"<b>{name}</b>" in page for name in ("base", "RAG", "fine-tuned", "both"))
