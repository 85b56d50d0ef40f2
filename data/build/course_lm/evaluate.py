"""Questions that measure CourseLM, and the figures: every gate of the model card.

All passages, entities, attributes and wordings asked about here are held out: whole author files of passages, other
word lists and attributes for the procedural tests, one wording of every general fact.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from utils.evaluation import exact_match, normalise, token_f1

import numpy as np

from .mixing import block_texts, without_gold_sentence, _span_of
from .procedural import Example, ProceduralGenerator
from .reading import Fact, Passage
from .substitution import plain
from .tokenizer import ABSTENTION

__all__ = ["normalise", "exact_match", "token_f1", "Outcome", "score", "natural_set", "unanswerable_set", "minimal_pair_set",
           "shuffled_set", "procedural_set", "fact_set", "unknown_set", "version_set", "summary"]


@dataclass(frozen=True)
class Outcome:
    """One answer, taken apart."""

    example: Example
    text: str
    answer: str  # without the citation
    cited: int | None
    abstained: bool
    exact: bool
    f1: float
    group: str


def score(example: Example, text: str, group: str) -> Outcome:
    """Take the written text apart and compare it with the example."""
    text = text.strip()
    match = re.search(r"\s*\[(\d+)\]$", text)
    answer = text[: match.start()] if match else text
    abstained = text == ABSTENTION
    truth = example.answer
    exact = abstained if truth is None else exact_match(answer, truth)
    f1 = float(abstained) if truth is None else token_f1(answer, truth)
    return Outcome(example, text, answer, int(match.group(1)) if match else None, abstained, exact, f1, group)


def _block(passage: Passage) -> tuple[str, str]:
    return plain(passage.title), plain(passage.text)


def natural_set(passages: list[Passage], rng: random.Random, distractors: int = 0, limit: int | None = None,
                pool: list[Passage] | None = None) -> list[Example]:
    """Questions with their passage among `distractors` others (half of them, where there are any, of the same domain)."""
    pool = pool or passages
    examples = []
    for passage in passages:
        for question, answer in passage.questions:
            others = [p for p in pool if p.id != passage.id]
            near = [p for p in others if p.domain == passage.domain]
            chosen = rng.sample(near, min(len(near), distractors // 2))
            chosen += rng.sample([p for p in others if p not in chosen], distractors - len(chosen))
            texts = [_block(p) for p in chosen]
            gold = rng.randint(0, len(texts))
            texts.insert(gold, _block(passage))
            examples.append(Example(plain(question), texts, plain(answer), gold, passage.id,
                                    _span_of(plain(answer), texts[gold][1])))
    return _limit(examples, rng, limit)


def unanswerable_set(passages, rng, distractors: int = 0, limit=None) -> list[Example]:
    """Tempting questions with the passage that does not answer them."""
    examples = []
    for passage in passages:
        for question in passage.unanswerable:
            texts = [_block(p) for p in rng.sample([p for p in passages if p.id != passage.id], distractors)]
            texts.insert(rng.randint(0, len(texts)), _block(passage))
            examples.append(Example(plain(question), texts, None, None, passage.id))
    return _limit(examples, rng, limit)


def minimal_pair_set(passages, rng, limit=None) -> list[Example]:
    """Answerable questions whose gold sentence alone was taken out."""
    examples = []
    for passage in passages:
        for question, answer in passage.questions:
            title, text = _block(passage)
            cut = without_gold_sentence(text, _span_of(plain(answer), text) or plain(answer))
            if cut:
                examples.append(Example(plain(question), [(title, cut)], None, None, passage.id))
    return _limit(examples, rng, limit)


def shuffled_set(passages, rng, blocks: int = 3, limit=None) -> list[Example]:
    """Questions with other people's passages only."""
    examples = [Example(plain(q), [_block(p) for p in rng.sample([o for o in passages if o.id != passage.id], blocks)],
                        None, None, passage.id) for passage in passages for q, _ in passage.questions]
    return _limit(examples, rng, limit)


def unknown_set(passages, rng, limit=None) -> list[Example]:
    """Passage questions with no passage at all."""
    return _limit([Example(plain(q), [], None, None, p.id) for p in passages for q, _ in p.questions], rng, limit)


def procedural_set(generator: ProceduralGenerator, rng, size: int, passages: int = 1) -> list[Example]:
    """Answerable look-ups (no yes/no, no reverse questions) on unseen entities and attributes."""
    examples = []
    while len(examples) < size:
        e = generator.example(rng, passages, 0.0)
        if e.kind == "procedural" and e.answer == e.span:
            examples.append(e)
    return examples


def version_set(generator: ProceduralGenerator, rng, size: int, passages: int = 2) -> list[Example]:
    """Two dated versions of a passage: the newer counts."""
    return [generator.versions(rng, passages) for _ in range(size)]


def fact_set(facts: list[Fact], rng, limit=None) -> list[Example]:
    """General facts closed-book in the wording that training never sees."""
    return _limit([Example(f.questions[f.held_out], [], f.answer, None, f.topic) for f in facts], rng, limit)


def _limit(examples: list[Example], rng: random.Random, limit: int | None) -> list[Example]:
    return examples if limit is None or limit >= len(examples) else rng.sample(examples, limit)


def prompt_text(example: Example) -> str:
    """The whole prompt, ending where the answer begins."""
    return "".join(block_texts(example.question, example.passages)) + "<|answer|>"


def summary(outcomes: list[Outcome], resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Rates in per cent with 95 % bootstrap intervals over passages (or single questions where there are none)."""
    def group(i: int, o: Outcome) -> str:  # the natural sets carry their passage's id as kind
        return o.example.kind if o.example.passages and not o.example.kind.startswith("procedural") else str(i)

    names = [group(i, o) for i, o in enumerate(outcomes)]
    keys = {name: i for i, name in enumerate(dict.fromkeys(names))}
    member = np.array([keys[name] for name in names])
    rng = np.random.default_rng(seed)
    figures: dict[str, float] = {"n": len(outcomes)}
    right = [o for o in outcomes if o.exact and o.example.gold is not None]
    rows = {"exact": [o.exact for o in outcomes], "f1": [o.f1 for o in outcomes],
            "abstained": [o.abstained for o in outcomes]}
    for name, values in rows.items():
        v = np.array(values, float)
        sums, counts = np.bincount(member, v, len(keys)), np.bincount(member, minlength=len(keys))
        draws = rng.integers(0, len(keys), (resamples, len(keys)))
        boot = sums[draws].sum(1) / counts[draws].sum(1)
        figures[name] = round(100 * float(v.mean()), 1)
        figures[f"{name}_low"], figures[f"{name}_high"] = (round(100 * float(x), 1) for x in np.percentile(boot, [2.5, 97.5]))
    if right:
        figures["citation_right_when_right"] = round(100 * float(np.mean([o.cited == o.example.gold + 1 for o in right])), 1)
    return figures
