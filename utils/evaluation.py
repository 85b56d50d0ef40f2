"""Measuring retrieval and answers: what was found, what was said, what it cost, and how sure we can be.

Retrieval metrics come from ir-measures. Answers are scored by SQuAD's exact match and token F1, by containment, abstention,
staleness and citations. Intervals are bootstrap intervals over facts, not over questions: the wordings of one fact succeed
and fail together, so counting them as independent would promise more certainty than there is.
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
from ir_measures import RR, R, nDCG
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from scipy.stats import binomtest

from .llm import ABSTENTION
from .settings import DATA

__all__ = ["Fact", "Question", "load_facts", "load_questions", "relevant_chunks", "retrieval_scores", "Interval",
           "bootstrap", "compare", "RETRIEVAL_METRICS", "squeeze",
           "normalise", "exact_match", "token_f1", "contains", "Answer", "read_answer", "KINDS", "Item", "Ticket",
           "load_items", "load_tickets", "raft_sample", "triage_question", "score_answers", "confusion", "summarise",
           "McNemar", "mcnemar", "holm", "across_seeds", "verdict", "percentile_ms", "training_flops", "inference_flops",
           "peak_memory_mb"]

RETRIEVAL_METRICS = {"recall@1": R @ 1, "recall@3": R @ 3, "recall@5": R @ 5, "recall@10": R @ 10, "MRR@10": RR @ 10,
                     "nDCG@10": nDCG @ 10}


@dataclass(frozen=True)
class Fact:
    """One line of the ledger as it holds in one snapshot."""

    id: str
    entity: str
    attribute: str
    value: str
    document: str
    evidence: str
    also: tuple[str, ...]
    asked: bool
    changed: bool
    superseded: Mapping[str, str] | None
    access_group: str


@dataclass(frozen=True)
class Question:
    """One wording of the question for a fact."""

    id: str
    fact: str
    wording: int
    split: str
    text: str
    kind: str
    shared: float
    few_shared: bool


def read_jsonl(path: Path) -> list[dict]:
    """Records of a JSON-lines file. Raises FileNotFoundError with the remedy, ValueError with file and line."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. It is part of the repository; restore it with: git checkout -- {path.name}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
    return records


def load_facts(snapshot: str, folder: Path = DATA / "questions") -> dict[str, Fact]:
    """The facts that hold in a snapshot ("2026-04-01" or "2026-10-01"), by id."""
    facts = {}
    for row in read_jsonl(folder / "facts.jsonl"):
        for version in row["versions"]:
            if version["snapshot"] == snapshot:
                first = version["value"] == row["versions"][0]["value"]  # `also` holds other forms of the first value
                facts[row["id"]] = Fact(row["id"], row["entity"], row["attribute"], version["value"], version["document"],
                                        version["evidence"], tuple(row["also"]) if first else (), row["asked"],
                                        row["changed"], row["superseded"], row["access_group"])
    if not facts:
        raise ValueError(f"no fact holds in snapshot '{snapshot}'; expected one of the folders of data/knowledge_base")
    return facts


def load_questions(split: str, snapshot: str, folder: Path = DATA / "questions") -> list[Question]:
    """Questions of a split ("train" or "held_out") about facts that hold in the snapshot."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'held_out'")
    facts = load_facts(snapshot, folder)
    return [Question(**{k: row[k] for k in Question.__dataclass_fields__})
            for row in read_jsonl(folder / "questions.jsonl") if row["split"] == split and row["fact"] in facts]


@lru_cache(maxsize=100_000)
def squeeze(text: str) -> str:
    """Only letters and digits, in small letters: the same for a Markdown table and the text a PDF reader makes of it."""
    return re.sub(r"[\W_]+", "", text.lower())


def relevant_chunks(facts: Mapping[str, Fact], nodes: Sequence[BaseNode]) -> dict[str, set[str]]:
    """Ids of the chunks in which each fact can be read.

    A chunk is relevant if it holds the fact's whole evidence; where the splitter cut through the evidence, the chunks of
    that document that hold the value and most of the evidence's words are.
    """
    by_document: dict[str, list[tuple[str, str, str]]] = {}
    for node in nodes:
        text = node.get_content(MetadataMode.NONE)
        by_document.setdefault(node.metadata["id"], []).append((node.node_id, squeeze(text), text.lower()))
    relevant = {}
    for fact in facts.values():
        chunks = by_document.get(fact.document, [])
        found = {i for i, squeezed, _ in chunks if squeeze(fact.evidence) in squeezed}
        if not found:
            words = set(re.findall(r"\w+", fact.evidence.lower()))
            shares = {i: len(words & set(re.findall(r"\w+", text))) / max(1, len(words))
                      for i, squeezed, text in chunks if squeeze(fact.value) in squeezed}
            best = max(shares.values(), default=0.0)
            found = {i for i, share in shares.items() if share == best}
        relevant[fact.id] = found
    return relevant


def retrieval_scores(rankings: Sequence[Sequence[NodeWithScore]], questions: Sequence[Question],
                     relevant: Mapping[str, set[str]]) -> pd.DataFrame:
    """One row a question, one column a metric (0 to 1), with `fact` and `few_shared` beside them.

    Questions whose fact has several relevant chunks (an overlap) count as found when any of them is: the run keeps only
    the first relevant chunk, so that recall is 1 as soon as the answer can be read.
    """
    qrels, run = [], []
    for ranking, question in zip(rankings, questions, strict=True):
        wanted = relevant[question.fact]
        qrels.append(ir_measures.Qrel(question.id, "answer", 1))
        seen = False
        for place, hit in enumerate(ranking):
            name = hit.node.node_id
            if name in wanted:
                if seen:
                    continue
                seen, name = True, "answer"
            run.append(ir_measures.ScoredDoc(question.id, name, float(-place)))
    table: dict[str, dict[str, float]] = {q.id: dict.fromkeys(RETRIEVAL_METRICS, 0.0) for q in questions}
    names = {measure: name for name, measure in RETRIEVAL_METRICS.items()}
    for metric in ir_measures.iter_calc(list(RETRIEVAL_METRICS.values()), qrels, run):
        table[metric.query_id][names[metric.measure]] = metric.value
    frame = pd.DataFrame([table[q.id] for q in questions], index=[q.id for q in questions])
    frame.insert(0, "fact", [q.fact for q in questions])
    frame.insert(1, "few_shared", [q.few_shared for q in questions])
    return frame


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self, digits: int = 1) -> str:
        """As per cent, for tables and prose."""
        return f"{100 * self.mean:.{digits}f} % [{100 * self.low:.{digits}f}, {100 * self.high:.{digits}f}]"

    def points(self, digits: int = 1) -> str:
        """A difference of two shares, in signed percentage points."""
        return f"{100 * self.mean:+.{digits}f} [{100 * self.low:+.{digits}f}, {100 * self.high:+.{digits}f}]"


def _resampled_means(values: np.ndarray, groups: Sequence, resamples: int, seed: int) -> np.ndarray:
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    size = member.max() + 1
    sums, counts = np.bincount(member, values, size), np.bincount(member, minlength=size)
    draws = np.random.default_rng(seed).integers(0, size, (resamples, size))
    return sums[draws].sum(1) / counts[draws].sum(1)


def bootstrap(values: Sequence[float], facts: Sequence, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` with a percentile bootstrap interval (Efron 1979) that redraws whole facts."""
    values = np.asarray(values, float)
    if len(values) == 0:
        raise ValueError("bootstrap() got no values; expected one value a question")
    low, high = np.percentile(_resampled_means(values, facts, resamples, seed), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def compare(first: Sequence[float], second: Sequence[float], facts: Sequence, resamples: int = 2000,
            seed: int = 0) -> tuple[Interval, str]:
    """The paired difference first - second with its interval, and a verdict: "first", "second" or "cannot tell"."""
    difference = bootstrap(np.asarray(first, float) - np.asarray(second, float), facts, resamples, seed)
    verdict = "first" if difference.low > 0 else "second" if difference.high < 0 else "cannot tell"
    return difference, verdict


# -- answers: text ------------------------------------------------------------------------------------------------------
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CITATION = re.compile(r"\s*\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and extra spaces (the SQuAD metric; Rajpurkar et al. 2016)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> bool:
    """Whether both are the same after `normalise`."""
    return normalise(answer) == normalise(truth)


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of the precision and recall of normalised tokens, 0 to 1."""
    a, t = normalise(answer).split(), normalise(truth).split()
    same = sum((Counter(a) & Counter(t)).values())
    return 0.0 if not same else 2 * same / (len(a) + len(t))


def contains(answer: str, truth: str) -> bool:
    """Whether the truth's normalised tokens stand in the answer one after the other; False where there are none."""
    return bool(normalise(truth)) and f" {normalise(truth)} " in f" {normalise(answer)} "


@dataclass(frozen=True)
class Answer:
    """A model's text, taken apart: `citations` are passage numbers from 1, each once, in the order of their mention."""

    text: str
    citations: tuple[int, ...]
    abstained: bool


def read_answer(text: str) -> Answer:
    """Take citations ("26 days [1][3]", "[1, 3]") out of a raw text and see whether it is `ABSTENTION`, however typed."""
    citations = [int(n) for group in _CITATION.findall(text) for n in group.split(",")]
    rest = _CITATION.sub("", text).strip()
    abstained = rest.lower().replace("’", "'").rstrip(". ") == ABSTENTION.lower().rstrip(".")
    return Answer(rest, tuple(dict.fromkeys(citations)), abstained)


# -- answers: the test --------------------------------------------------------------------------------------------------
_TUNED, _ASKED = "2026-04-01", "2026-10-01"  # how the facts stood when the models were tuned, and when they are asked
KINDS = ("lookup", "few shared words", "conflict", "changed", "unanswerable", "triage")
_PER_KIND = {"lookup": 120, "few shared words": 100, "conflict": 60, "changed": 90, "unanswerable": 100, "triage": 132}


@dataclass(frozen=True)
class Item:
    """One question of a test."""

    id: str
    cluster: str  # the fact (else the item's own id), the unit of the bootstrap
    kind: str
    text: str
    accepted: tuple[str, ...]  # right answers; none where the right thing is to abstain
    outdated: tuple[str, ...] = ()  # what was right before, or stands in an older edition
    document: str = ""  # id of the document that holds the answer; empty where none does


def raft_sample(facts: Mapping[str, Fact], questions: Sequence[Question], n: int = 300, seed: int = 0) -> list[Question]:
    """`n` of the questions on facts that training may ask about, every fact once before any twice, for a RAFT-style adapter."""
    return _draw([q for q in questions if facts[q.fact].asked], lambda question: question.fact, n, seed)


@dataclass(frozen=True)
class Ticket:
    """One labelled service ticket."""

    id: str
    code: str
    channel: str
    text: str
    split: str


def load_tickets(split: str, folder: Path = DATA / "questions") -> list[Ticket]:
    """Tickets of a split ("train" or "held_out")."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'held_out'")
    return [Ticket(**row) for row in read_jsonl(folder / "tickets.jsonl") if row["split"] == split]


def triage_question(ticket_text: str) -> str:
    """The question by which every system is asked for a ticket's code."""
    return f"Which triage code does this ticket get? {ticket_text}"


def _fact_items(asked: bool | None, folder: Path) -> list[Item]:
    before, now = load_facts(_TUNED, folder), load_facts(_ASKED, folder)
    items = []
    for question in load_questions("held_out", _ASKED, folder):
        fact = now[question.fact]
        if fact.id not in before or asked not in (None, fact.asked):
            continue
        kind, accepted, outdated = "few shared words" if question.few_shared else "lookup", (fact.value, *fact.also), ()
        if fact.changed:
            old = before[fact.id]
            new = tuple(v for v in old.also if squeeze(fact.value) in squeeze(v))  # some of `also` mean the new value
            kind, accepted, outdated = "changed", (fact.value, *new), (old.value, *(v for v in old.also if v not in new))
        elif question.kind == "conflict":
            kind, outdated = "conflict", (fact.superseded["value"],)
        items.append(Item(question.id, fact.id, kind, question.text, accepted, outdated, fact.document))
    return items


def _draw(items: Sequence[Any], group_of: Callable[[Any], Any], wanted: int, seed: int) -> list[Any]:
    """A sample in turns: first one item (with an `id`) of every group, then a second of every one, and so on."""
    shuffled, turn, drawn = random.Random(seed).sample(items, len(items)), {}, Counter()
    for item in shuffled:
        group = group_of(item)
        turn[item.id] = drawn[group]
        drawn[group] += 1
    return sorted(shuffled, key=lambda item: turn[item.id])[:wanted]


def load_items(per_kind: Mapping[str, int] | None = None, asked: bool | None = None, seed: int = 0,
               folder: Path = DATA / "questions") -> list[Item]:
    """The side-by-side test, by kind, then id: held-out questions asked in October of models tuned in April 2026.

    per_kind : questions wanted of each of `KINDS` (default: 602 in all); where there are fewer, all of them.
    asked : only facts whose entity training did (True) or did not (False) ask about; other items stay.
    seed : of the sample, which holds as many different facts as it can and all triage codes equally often.
    """
    per_kind = _PER_KIND if per_kind is None else per_kind
    for kind, wanted in per_kind.items():
        if kind not in KINDS or wanted < 0:
            raise ValueError(f"per_kind asks for {wanted} of '{kind}'; expected 0 or more of {', '.join(KINDS)}")
    pool = _fact_items(asked, folder)
    pool += [Item(u["id"], u["id"], "unanswerable", u["text"], ()) for u in read_jsonl(folder / "unanswerable.jsonl")]
    pool += [Item(t.id, t.id, "triage", triage_question(t.text), (t.code,)) for t in load_tickets("held_out", folder)]
    samples = [_draw([item for item in pool if item.kind == kind],
                     lambda item: item.accepted if item.kind == "triage" else item.cluster, per_kind.get(kind, 0), seed)
               for kind in KINDS]
    return [item for sample in samples for item in sorted(sample, key=lambda item: item.id)]


# -- answers: scores ----------------------------------------------------------------------------------------------------
def _matches(answer: str, values: Sequence[str]) -> bool:
    return any(exact_match(answer, v) or contains(answer, v) for v in values)


def _cites_right(item: Item, citations: Sequence[int], documents: Sequence[str] | None) -> float:
    if documents is None or not citations or not item.accepted or not item.document:
        return float("nan")
    return float(all(1 <= n <= len(documents) and documents[n - 1] == item.document for n in citations))


def score_answers(items: Sequence[Item], texts: Sequence[str],
                  cited_documents: Sequence[Sequence[str]] | None = None) -> pd.DataFrame:
    """One row an item, with its id as index, for the raw `texts` that a model answered.

    cited_documents : for each item the ids of the documents of its passages, in the prompt's order; [1] is the first.

    Columns: `cluster`, `kind`, `answer` (without citations), `abstained`, `exact`, `f1` (0 to 1, the best over accepted
    values), `correct` (an accepted value is the answer or stands in it; an abstention where nothing is accepted), `stale`
    (not correct, and an outdated value is the answer or stands in it), `wrong` (neither correct nor an abstention),
    `cites_right` (1 where every citation points to the item's document; NaN without citation, passages or document).
    """
    sources = [None] * len(items) if cited_documents is None else cited_documents
    if not len(items) == len(texts) == len(sources):
        raise ValueError(f"got {len(items)} items, {len(texts)} texts and cited_documents of {len(sources)}; "
                         "expected one an item")
    rows = []
    for item, text, documents in zip(items, texts, sources):
        answer = read_answer(text)
        if item.accepted:
            exact = any(exact_match(answer.text, v) for v in item.accepted)
            f1 = max(token_f1(answer.text, v) for v in item.accepted)
            correct = not answer.abstained and _matches(answer.text, item.accepted)
        else:
            exact, f1, correct = answer.abstained, float(answer.abstained), answer.abstained
        stale = not correct and _matches(answer.text, item.outdated)
        rows.append((item.cluster, item.kind, answer.text, answer.abstained, exact, f1, correct, stale,
                     not correct and not answer.abstained, _cites_right(item, answer.citations, documents)))
    columns = ["cluster", "kind", "answer", "abstained", "exact", "f1", "correct", "stale", "wrong", "cites_right"]
    return pd.DataFrame(rows, columns=columns, index=pd.Index([item.id for item in items], name="id"))


def confusion(scores: pd.DataFrame) -> pd.DataFrame:
    """Counts of what became of questions that have an answer and of those of kind "unanswerable"."""
    rows = np.where(scores["kind"] == "unanswerable", "unanswerable", "answerable")
    columns = np.where(scores["abstained"], "abstained", np.where(scores["correct"], "answered right", "answered wrong"))
    return pd.crosstab(rows, columns).reindex(index=["answerable", "unanswerable"], fill_value=0,
                                              columns=["answered right", "answered wrong", "abstained"])


def summarise(scores: pd.DataFrame, by: str = "kind", resamples: int = 2000) -> pd.DataFrame:
    """One row a group, then "all": `items` (how many) and an `Interval` each for `correct`, `f1` and `abstained`."""
    groups = [*scores.groupby(by, sort=False), ("all", scores)]
    table = [{"items": len(g)} | {c: bootstrap(g[c], g["cluster"], resamples) for c in ("correct", "f1", "abstained")}
             for _, g in groups]
    return pd.DataFrame(table, index=pd.Index([name for name, _ in groups], name=by))


# -- answers: statistics ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class McNemar:
    """Questions that only one of two systems got right, and how probable so uneven a split is between equal systems."""

    first_only: int
    second_only: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact two-sided test of two systems on the same questions (McNemar 1947); p = 1 where they never differ."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or not np.isin(np.concatenate([a, b]), (0, 1)).all():
        raise ValueError(f"mcnemar() got {a.size} and {b.size} values; expected True or False for the same questions")
    only = int((a > b).sum()), int((b > a).sum())
    return McNemar(*only, float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for several planned comparisons (Holm 1979), in the order given."""
    if bad := [name for name, p in p_values.items() if not 0 <= p <= 1]:
        raise ValueError(f"the p-value of '{bad[0]}' is {p_values[bad[0]]}; expected a number from 0 to 1")
    adjusted, worst = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        worst = adjusted[name] = max(worst, min(1.0, (len(p_values) - place) * p_values[name]))
    return {name: adjusted[name] for name in p_values}


def across_seeds(frames: Sequence[pd.DataFrame], column: str = "correct", resamples: int = 2000,
                 seed: int = 0) -> Interval:
    """Mean of a column over training seeds (`frames`, one `score_answers` table each, of the same items) and items.

    The interval redraws seeds and clusters independently (the pigeonhole bootstrap, Owen 2007); NaN is left out. A single
    frame says nothing about the spread between seeds.
    """
    if not frames or not frames[0][column].notna().any():
        raise ValueError(f"across_seeds() got no values of '{column}'; expected one table a training seed")
    for number, frame in enumerate(frames[1:], 2):
        if not frame["cluster"].equals(frames[0]["cluster"]):
            raise ValueError(f"frame {number} holds other items than frame 1, or another order; expected the same test")
    values = np.stack([frame[column].to_numpy(float) for frame in frames])
    known = ~np.isnan(values)
    _, member = np.unique(np.asarray(frames[0]["cluster"]), return_inverse=True)
    sums = np.stack([np.bincount(member, row) for row in np.where(known, values, 0.0)])  # seeds × clusters
    counts = np.stack([np.bincount(member, row) for row in known])
    rng = np.random.default_rng(seed)
    seeds, clusters = (rng.multinomial(n, np.full(n, 1 / n), resamples) for n in sums.shape)
    with np.errstate(invalid="ignore"):
        means = ((seeds @ sums) * clusters).sum(1) / ((seeds @ counts) * clusters).sum(1)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return Interval(float(values[known].mean()), float(low), float(high))


def verdict(difference: Interval, p: float, alpha: float = 0.05) -> str:
    """"first" or "second" where the interval of first - second excludes 0 and p < alpha, else "cannot tell"."""
    if p < alpha and difference.low > 0:
        return "first"
    return "second" if p < alpha and difference.high < 0 else "cannot tell"


# -- costs --------------------------------------------------------------------------------------------------------------
def percentile_ms(seconds: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of durations given in seconds, in milliseconds."""
    if len(seconds) == 0:
        raise ValueError("percentile_ms() got no durations; expected one a question, in seconds")
    return 1000 * float(np.percentile(np.asarray(seconds, float), q))


def training_flops(parameters: int, tokens: int, lora: bool) -> int:
    """Operations: 2·N a token forward, 2·N for activations' gradients, in full training 2·N for weights' (Kaplan 2020)."""
    return (4 if lora else 6) * parameters * tokens


def inference_flops(parameters: int, tokens: int) -> int:
    """2·N floating-point operations a token read or written (Kaplan et al. 2020)."""
    return 2 * parameters * tokens


def peak_memory_mb() -> float:
    """The most memory (resident set, MB) that this process has held at any time: Python, libraries and all models together."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
