"""From passages, facts and the generator to training examples, freshly drawn at every step."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

import torch

from .model import Batch
from .procedural import Example, ProceduralGenerator, injection, two_dates
from .reading import Fact, Passage
from .substitution import ValuePool, invented, plain, substitute
from .tokenizer import ABSTENTION

__all__ = ["Mixer", "Stage", "encode", "block_texts", "target_text", "split_sentences", "without_gold_sentence"]

MAX_BLOCK, MAX_ANSWER = 380, 60


@dataclass(frozen=True)
class Stage:
    """Shares of the mixture at one point of training (of examples; the rest are natural passages)."""

    procedural: float = 0.4
    facts: float = 0.08
    closed_unknown: float = 0.02
    unanswerable: float = 0.2
    passages: tuple[float, ...] = (0.6, 0.18, 0.1, 0.06, 0.06)  # probability of 1, 2, … passages
    injected: float = 0.05
    versions: float = 0.06
    drill: float = 0.0  # of the procedural examples: two dated versions, whatever the number of passages drawn

    @staticmethod
    def at(progress: float) -> "Stage":
        """The mixture at `progress` (0 to 1) of the run: short and procedural first, negatives ramped up late."""
        early = max(0.0, 1 - progress / 0.3)
        late = min(1.0, max(0.0, (progress - 0.4) / 0.1))  # closed-book facts cost little time: many of them, late
        rest = 1 - 0.36 * late
        return Stage(procedural=(0.24 + 0.36 * early) * rest, facts=0.2 - 0.1 * early + 0.3 * late,
                     closed_unknown=0.04 + 0.02 * late, unanswerable=0.22 - 0.16 * early + 0.05 * late,
                     passages=tuple((1 - early) * p + early * q for p, q in
                                    zip((0.62, 0.17, 0.10, 0.06, 0.05), (0.85, 0.15, 0, 0, 0))),
                     injected=0.05 * (1 - early), versions=0.07 * (1 - early) + 0.08 * late)

    @staticmethod
    def further() -> "Stage":
        """The one mixture of a run that goes on from shipped weights: more natural passages, strangers and versions."""
        return Stage(procedural=0.22, facts=0.30, closed_unknown=0.05, unanswerable=0.26,
                     passages=(0.58, 0.2, 0.11, 0.06, 0.05), injected=0.05, versions=0.15, drill=0.25)


def split_sentences(text: str) -> list[str]:
    """Sentences or lines, with what separates them kept, so that "".join gives the text back."""
    return [s for s in re.split(r"(?<=[.!?])(?=\s)|(?=\n)", text) if s]


def without_gold_sentence(text: str, answer: str) -> str | None:
    """The text without the only sentence that holds the answer; None where that is not unique."""
    sentences = split_sentences(text)
    holding = [i for i, s in enumerate(sentences) if answer in s]
    if len(holding) != 1 or len(sentences) < 3:
        return None
    return "".join(s for i, s in enumerate(sentences) if i != holding[0]).strip()


def block_texts(question: str, passages: list[tuple[str, str]]) -> list[str]:
    """The prompt's blocks, exactly as the chat template writes them."""
    if not passages:
        return [f"<|question|>{question}"]
    return [f"<|question|>{question}<|document|>[{k}] " + (f"{title}\n{text}" if title else text)
            for k, (title, text) in enumerate(passages, 1)]


def target_text(example: Example) -> str:
    """What the model should write: the answer with its citation, or the fixed sentence."""
    if example.answer is None:
        return ABSTENTION
    return f"{example.answer} [{example.gold + 1}]" if example.gold is not None else example.answer


def _span_of(answer: str, text: str) -> str | None:
    for candidate in (answer, re.sub(r"^(Yes|No)[,.]?\s*", "", answer)):
        if candidate and candidate in text:
            return candidate
    return None


class Mixer:
    """Draws examples. Everything comes from one `random.Random`, so a seed gives the same stream."""

    def __init__(self, passages: list[Passage], facts: list[Fact], generator: ProceduralGenerator, pool: ValuePool):
        self.passages, self.facts, self.generator, self.pool = passages, facts, generator, pool

    def draw(self, stage: Stage, rng: random.Random) -> Example:
        """One example according to the stage."""
        kind = rng.random()
        if kind < stage.facts:
            return self.fact(rng)
        if kind < stage.facts + stage.closed_unknown:
            return self.closed_unknown(rng)
        n = rng.choices(range(1, len(stage.passages) + 1), stage.passages)[0]
        if kind < stage.facts + stage.closed_unknown + stage.procedural:
            example = self.generator.versions(rng, max(n, 2)) if rng.random() < stage.drill \
                else self.generator.example(rng, n, stage.unanswerable)
        else:
            example = self.natural(rng, n, stage)
        if rng.random() < stage.injected:
            self.inject(example, rng)
        return self.vary(example, rng)

    def fact(self, rng: random.Random) -> Example:
        """A general fact: closed-book in a training wording, or with its statement as the passage."""
        fact = rng.choice(self.facts)
        question = rng.choice(fact.trained)
        if rng.random() < 0.12:
            text = rng.choice(fact.statements)
            span = _span_of(fact.answer, text)
            if span:
                return self.vary(Example(question, [("", text)], fact.answer, 0, "fact-read", span), rng)
        return self.vary(Example(question, [], fact.answer, None, "fact"), rng)

    def closed_unknown(self, rng: random.Random) -> Example:
        """A question without passage that nobody could answer: about a passage, or an invented name in a fact."""
        if rng.random() < 0.5:
            fact = rng.choice(self.facts)
            question = fact.questions[0]
            names = [m for m in re.finditer(r"(?<=[a-z,] )[A-Z]\w+(?: [A-Z]\w+)*", question)]
            if names:
                name = rng.choice(names)
                new = invented(rng.choice(["PERSON", "PLACE", "PRODUCT"]), rng)
                return self.vary(Example(question[:name.start()] + new + question[name.end():], [], None, None,
                                         "unknown"), rng)
        passage = rng.choice(self.passages)
        question = rng.choice(passage.questions)[0] if rng.random() < 0.8 else rng.choice(passage.unanswerable)
        return self.vary(Example(substitute([question], self.pool, rng)[0], [], None, None, "unknown"), rng)

    def natural(self, rng: random.Random, n: int, stage: Stage) -> Example:
        """A question on a hand-written passage with n - 1 distractors, or one that is not answered."""
        passage = rng.choice(self.passages)
        question, answer = rng.choice(passage.questions)
        if rng.random() < stage.unanswerable:
            return self.natural_unanswerable(rng, n, passage, question, answer)
        if n > 1 and rng.random() < stage.versions * 2:
            example = self.natural_version(rng, n, passage, question, answer)
            if example:
                return example
        title, text, question, answer = substitute([passage.title, passage.text, question, answer], self.pool, rng)
        texts = [(self.title(title, rng), text)]
        names = [m for kind, m in _slots(passage, question=True) if kind in {"PERSON", "ORG", "PRODUCT", "PLACE"}]
        for _ in range(n - 1):
            texts.append(self.distractor(rng, passage, sibling=bool(names)))
        gold = rng.randrange(n)
        texts[0], texts[gold] = texts[gold], texts[0]
        return Example(question, texts, answer, gold, "natural", _span_of(answer, text))

    def natural_unanswerable(self, rng, n, passage, question, answer) -> Example:
        kind = rng.random()
        if kind < 0.45 and passage.unanswerable:  # the passage's own tempting question
            question = rng.choice(passage.unanswerable)
            title, text, question = substitute([passage.title, passage.text, question], self.pool, rng)
        elif kind < 0.72:  # minimal pair: only the gold sentence is gone
            title, text, question, answer = substitute([passage.title, passage.text, question, answer], self.pool, rng)
            cut = without_gold_sentence(text, _span_of(answer, text) or answer)
            if cut is None:
                return self.natural_unanswerable(rng, n, passage, passage.questions[0][0], passage.questions[0][1])
            text = cut
        else:  # somebody else's passages
            question = substitute([question], self.pool, rng)[0]
            title, text = self.distractor(rng, passage, sibling=False)
        texts = [(self.title(title, rng), text)]
        texts += [self.distractor(rng, passage, sibling=False) for _ in range(n - 1)]
        rng.shuffle(texts)
        return Example(question, texts, None, None, "natural-unanswerable")

    def natural_version(self, rng, n, passage, question, answer) -> Example | None:
        """The same passage twice, with dates, the asked value changed; the newer one counts."""
        slots = re.findall(r"\[\[([A-Z]+):([^\[\]]+)\]\]", answer)
        if len(slots) != 1 or f"[[{slots[0][0]}:{slots[0][1]}]]" in question:
            return None
        kind, value = slots[0]
        marked = f"[[{kind}:{value}]]"
        other = self.pool.draw(kind, value, rng)
        texts = substitute([passage.title, passage.text.replace(marked, "\0"), question, answer.replace(marked, "\0")],
                           self.pool, rng)
        new = self.pool.draw(kind, value, rng)
        if new == other or other in texts[1] or new in texts[1]:
            return None
        dates = two_dates(rng)
        form = rng.choice(["{t} ({d})", "{t}, effective {d}", "{t} | {d}", "{d} {t}", "{t}, as of {d}", "{t} – valid from {d}"])
        old_text = (form.format(t=texts[0], d=dates[0]), texts[1].replace("\0", other))
        current = (form.format(t=texts[0], d=dates[1]), texts[1].replace("\0", new))
        answer = texts[3].replace("\0", new)
        out = [old_text, current] + [self.distractor(rng, passage, sibling=False) for _ in range(n - 2)]
        rng.shuffle(out)
        return Example(texts[2], out, answer, out.index(current), "natural-version", _span_of(answer, current[1]))

    def distractor(self, rng: random.Random, passage: Passage, sibling: bool) -> tuple[str, str]:
        """Another passage: any, one of the same domain, the same one with all names changed, or a made-up one."""
        kind = rng.random()
        if sibling and kind < 0.25:
            title, text = substitute([passage.title, passage.text], self.pool, rng, change=1.0)
            return self.title(title, rng), text
        if kind > 0.9:
            g = self.generator
            return g.title(rng), g.render(g.facts(rng, 2, 2), rng)
        for _ in range(5):
            other = rng.choice(self.passages)
            if other.id != passage.id and (kind > 0.5 or other.domain == passage.domain):
                break
        while other.id == passage.id:
            other = rng.choice(self.passages)
        title, text = substitute([other.title, other.text], self.pool, rng, change=0.5)
        if rng.random() < 0.3:  # only a part of it, so that lengths vary
            sentences = split_sentences(text)
            text = "".join(sentences[: rng.randint(1, len(sentences))]).strip()
        return self.title(title, rng), text

    @staticmethod
    def title(title: str, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.2:
            return ""
        if kind < 0.35:
            return f"{title} ({two_dates(rng)[0]})"
        return title

    def inject(self, example: Example, rng: random.Random) -> None:
        """Put an order to the reader into one of the passages; what is right stays right."""
        i = rng.randrange(len(example.passages))
        title, text = example.passages[i]
        sentences = split_sentences(text)
        at = rng.randint(0, len(sentences))
        order = injection(rng, self.generator.list)
        example.passages[i] = (title, ("".join(sentences[:at]) + (" " if at else "") + order
                                       + ("" if at and at < len(sentences) else " ") + "".join(sentences[at:])).strip())

    @staticmethod
    def vary(example: Example, rng: random.Random) -> Example:
        """Now and then small letters or no question mark, as people type."""
        if rng.random() < 0.06:
            example.question = example.question.lower()
        if rng.random() < 0.08:
            example.question = example.question.rstrip("?. ")
        return example


def _slots(passage: Passage, question: bool) -> list[tuple[str, str]]:
    return [m for q, _ in passage.questions for m in re.findall(r"\[\[([A-Z]+):([^\[\]]+)\]\]", q)]


def encode(examples: list[Example], tokenizer, filler: bool = True) -> list[dict]:
    """Token ids of blocks, answer and span for each example; examples that are too long are left out.

    tokenizer : a `tokenizers.Tokenizer`.
    """
    texts, counts = [], []
    for example in examples:
        blocks = block_texts(example.question, example.passages)
        counts.append(len(blocks))
        texts += blocks
    encoded = tokenizer.encode_batch(texts)
    answers = tokenizer.encode_batch([f"<|answer|>{target_text(e)}<|end|>" for e in examples])
    out, at = [], 0
    for example, count, answer in zip(examples, counts, answers):
        blocks = encoded[at: at + count]
        at += count
        if max(len(b.ids) for b in blocks) > MAX_BLOCK or len(answer.ids) > MAX_ANSWER:
            continue
        span = (0, 0)  # nowhere
        block = 0
        if example.gold is not None:
            span = (-100, -100)
            block = example.gold
            if example.span:
                text = texts[at - count + block]
                header = text.index("<|document|>")
                start = text.find(example.span, header)
                if start >= 0:
                    end = start + len(example.span)
                    inside = [i for i, (a, b) in enumerate(blocks[block].offsets) if a < end and b > start]
                    if inside:
                        span = (inside[0], inside[-1])
        elif example.answer is not None:
            span = (-100, -100)
        out.append(dict(blocks=[b.ids for b in blocks], answer=answer.ids, span=span, gold=block, example=example,
                        pointer=_pointer(answer.ids, tokenizer, span, example)))
    return out


def _pointer(answer: list[int], tokenizer, span: tuple[int, int], example: Example) -> list[int]:
    """For each token of the answer row, where in the gold block the next one stands (-100: nowhere)."""
    pointer = [-100] * (len(answer) - 1)
    if span[0] <= 0 or example.gold is None:
        return pointer
    written = len(tokenizer.encode(f"<|answer|>{example.answer}").ids) - 1
    length = span[1] - span[0] + 1
    if written == length or example.answer != example.span and written > length:  # "Yes, " stands before the span
        for j in range(length):
            pointer[written - length + j] = span[0] + j
    return pointer


def collate(items: list[dict], pad: int, filler: int | None = None, multiple: int = 1) -> Batch:
    """Pad items with the same number of blocks to lengths that are a multiple of `multiple` (answers: to 8, 16, 32 or 60).

    With `filler`, blocks are filled up with that visible token instead of masked padding.
    """
    n = len(items[0]["blocks"])
    length = multiple * math.ceil(max(len(b) for item in items for b in item["blocks"]) / multiple)
    answer_length = max(len(item["answer"]) for item in items) - 1
    if multiple > 1:
        answer_length = next(length for length in (8, 16, 32, MAX_ANSWER) if answer_length <= length)
    blocks = torch.full((len(items), n, length), pad if filler is None else filler, dtype=torch.long)
    mask = torch.full((len(items), n, length), filler is not None, dtype=torch.bool)
    answers = torch.full((len(items), answer_length), pad, dtype=torch.long)
    targets = torch.full((len(items), answer_length), -100, dtype=torch.long)
    span = torch.full((len(items), 2), -100, dtype=torch.long)
    pointer = torch.full((len(items), answer_length), -100, dtype=torch.long)
    for i, item in enumerate(items):
        for j, ids in enumerate(item["blocks"]):
            blocks[i, j, : len(ids)] = torch.tensor(ids)
            mask[i, j, : len(ids)] = True
        ids = item["answer"]
        answers[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[i, : len(ids) - 1] = torch.tensor(ids[1:])
        if item["span"][0] >= 0:
            base = item["gold"] * length if item["span"] != (0, 0) else 0
            span[i] = torch.tensor([base + item["span"][0], base + item["span"][1]])
        row = torch.tensor(item["pointer"])
        pointer[i, : len(row)] = torch.where(row >= 0, row + item["gold"] * length, row)
    return Batch(blocks, mask, answers, targets, span, pointer)
