"""The measurements that take too long for a notebook: three training seeds, ablations, costs.

`python -m data.build.experiments` writes data/experiments/*.json and data/adapters/.
Every trained model and every table is kept as soon as it is finished, with a fingerprint of the data and recipes that
it was made from: an interrupted run goes on where it stopped, and a second run with nothing changed does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from utils.settings import DATA, ROOT, WORK, banner, seed_everything

import numpy as np
import pandas as pd
from llama_index.core.schema import NodeWithScore

from utils.embedding import CourseEmbedding
from utils.evaluation import (Item, bootstrap, inference_flops, load_facts, load_items, load_questions, load_tickets,
                              peak_memory_mb, percentile_ms, raft_sample, relevant_chunks, score_answers, training_flops, triage_question)
from utils.finetuning import (ADAPTERS, APRIL, RAFT, Pair, Recipe, adapter_path, answer_nll, april_pairs, fact_pairs, load_pairs,
                              merged, raft_pairs, tune, tuned, wrap)
from utils.llm import LanguageModel, load_llm
from utils.rag import NewestEdition, Rag, ticket_nodes
from utils.retrieval import SearchEngine, build_index, dense_retriever, search_engine

__all__ = ["main"]

FOLDER = DATA / "experiments"
SEEDS = (0, 1, 2)
TOP_K, TICKETS_K = 3, 5
#: the small run of which lesson 03 shows variants
ABLATION = Recipe(rank=16, alpha=32, rate=2e-3, epochs=14, batch=24)
#: raise it when a change of a program changes what is measured
METHOD = 1
#: data that the tables are made from
SOURCES = ("data/course_lm/SHA256SUMS", "data/questions/facts.jsonl", "data/questions/questions.jsonl",
           "data/questions/tickets.jsonl", "data/questions/unanswerable.jsonl", "data/general/replay.jsonl",
           "data/general/held_out.jsonl", "data/knowledge_base/2026-04-01/catalogue.csv",
           "data/knowledge_base/2026-10-01/catalogue.csv")


# -- keeping -----------------------------------------------------------------------------------------------------------
def fingerprint() -> str:
    """Of the data, recipes and `METHOD` behind the tables."""
    digest = hashlib.sha256(repr((METHOD, APRIL, RAFT, ABLATION, TOP_K, TICKETS_K)).encode())
    for name in SOURCES:
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def write(path: Path, content: dict) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, ensure_ascii=False, indent=None, separators=(",", ":")).replace("],[", "],\n[") + "\n",
                    encoding="utf-8")
    os.replace(part, path)


def table(name: str, seeds: Sequence[int], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table `name`: from its file when that was made from the same programs and data, else made and written now."""
    path, made_from = FOLDER / f"{name}.json", fingerprint()
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made_from"] == made_from and content["seeds"] == list(seeds):
            print(f"{name}: unchanged, kept", flush=True)
            return pd.DataFrame(content["rows"], columns=content["columns"])
    begin = time.perf_counter()
    print(f"{name} …", flush=True)
    frame = make()
    rows = [[None if isinstance(v, float) and np.isnan(v) else v.item() if hasattr(v, "item") else v for v in row]
            for row in frame.itertuples(index=False, name=None)]
    write(path, {"name": name, "banner": banner(tuple(seeds)), "seeds": list(seeds), "made_from": made_from,
                 "date": f"{datetime.date.today():%Y-%m-%d}", "minutes": round((time.perf_counter() - begin) / 60, 1),
                 "columns": list(frame.columns), "rows": rows})
    print(f"{name}: {len(frame)} rows in {(time.perf_counter() - begin) / 60:.1f} min", flush=True)
    return frame


def part(name: str, make: Callable[[], list[dict]]) -> list[dict]:
    """Rows of a table that were kept on the way, or made and kept now."""
    path = WORK / "experiments" / f"{name}-{fingerprint()}.json"
    if not path.exists():
        write(path, {"rows": make()})
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


# -- what is trained ---------------------------------------------------------------------------------------------------
class Company:
    """Facts, questions, engines and training pairs, made once."""

    def __init__(self) -> None:
        self.embedder = CourseEmbedding()
        self.april_facts = load_facts("2026-04-01")
        self.train_questions = load_questions("train", "2026-04-01")
        self.tickets = [(triage_question(t.text), t.code) for t in load_tickets("train")]
        self.april_pairs = april_pairs(self.april_facts, self.train_questions, self.tickets)

    @cached_property
    def base(self) -> LanguageModel:
        """The model as shipped; never tuned, `tuned` loads its own."""
        return load_llm()

    @cached_property
    def april(self) -> SearchEngine:
        return search_engine("2026-04-01", self.embedder)

    @cached_property
    def october(self) -> SearchEngine:
        return search_engine("2026-10-01", self.embedder)

    @cached_property
    def raft_pairs(self) -> list[Pair]:
        questions = raft_sample(self.april_facts, self.train_questions)
        rag = self.rag(self.april)
        return raft_pairs(self.april_facts, questions, [rag.retrieve(q.text) for q in questions],
                          relevant_chunks(self.april_facts, self.april.nodes))

    def rag(self, engine: SearchEngine) -> Rag:
        """The pipeline of the lessons on a snapshot, with the base model."""
        return Rag(self.base, engine.hybrid, [NewestEdition.of(engine.nodes)], TOP_K)

    def adapter(self, name: str, seed: int) -> tuple[LanguageModel, dict]:
        """A model with the adapter of that name and seed; its files are also put into data/adapters."""
        pairs, recipe = (self.april_pairs, APRIL) if name == "april" else (self.raft_pairs, RAFT)
        recipe = dataclasses.replace(recipe, seed=seed)
        llm, info = tuned(name, pairs, recipe, label=f"{name}, seed {seed}")
        kept, folder = adapter_path(name, pairs, recipe), ADAPTERS / f"{name}-{seed}"
        if not (folder / "adapter_model.safetensors").exists() or \
                (folder / "adapter_model.safetensors").read_bytes() != (kept / "adapter_model.safetensors").read_bytes():
            temporary = folder.with_name(folder.name + ".part")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(kept, temporary, ignore=shutil.ignore_patterns("history.csv"))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        print(f"  {name}, seed {seed}: trained in {info['seconds']:.0f} s", flush=True)
        return llm, info


# -- the side-by-side answers ------------------------------------------------------------------------------------------
def contexts(company: Company, items: Sequence[Item]) -> tuple[dict[str, list], list[float]]:
    """Hits of every item for the arms RAG, oracle and shuffled, and the seconds that retrieval took."""
    engine, facts = company.october, load_facts("2026-10-01")
    rag = company.rag(engine)
    labelled = ticket_nodes(load_tickets("train"))
    few_shot = Rag(company.base, dense_retriever(build_index(labelled, company.embedder), top_k=TICKETS_K), top_k=TICKETS_K)
    relevant = relevant_chunks(facts, engine.nodes)
    company.embedder.encode([i.text for i in items], label="embedding questions")
    found, seconds = [], []
    for item in items:
        begin = time.perf_counter()
        found.append((few_shot if item.kind == "triage" else rag).retrieve(item.text))
        seconds.append(time.perf_counter() - begin)
    oracle = [[NodeWithScore(node=n, score=1.0) for n in engine.nodes if n.node_id in relevant[i.cluster]][:1]
              if i.cluster in relevant else hits for i, hits in zip(items, found)]
    mixed = np.random.default_rng(0).permutation(len(items))
    other = {int(a): int(b) for a, b in zip(mixed, np.roll(mixed, 1))}
    shuffled = [found[other[i]] for i in range(len(items))]
    return {"RAG": found, "oracle": oracle, "shuffled": shuffled, "none": [[] for _ in items]}, seconds


def answer_rows(arm: str, seed: int, llm: LanguageModel, items: Sequence[Item], hits: list, retrieval: Sequence[float]) -> list[dict]:
    """One arm's answers to all items, scored."""
    traces = Rag(llm, None).ask([i.text for i in items], hits=hits)
    scores = score_answers(items, [t.text for t in traces], [t.documents for t in traces])
    return [{"seed": seed, "arm": arm, "id": i.id, "cluster": i.cluster, "kind": i.kind, "answer": s.answer,
             "abstained": bool(s.abstained), "exact": float(s.exact), "f1": round(float(s.f1), 4), "correct": float(s.correct),
             "stale": float(s.stale), "cites_right": None if pd.isna(s.cites_right) else float(s.cites_right),
             "prompt_tokens": t.generation.prompt_tokens, "seconds": round(t.generation.seconds, 5),
             "retrieval_seconds": round(r if h else 0.0, 5)}
            for i, s, t, r, h in zip(items, scores.itertuples(), traces, retrieval, hits)]


def answers(company: Company, seeds: Sequence[int]) -> pd.DataFrame:
    """All arms on all items; arms without training once."""
    items = load_items()

    @cache  # only where some rows are not kept yet, and once for all arms
    def found() -> tuple[dict[str, list], list[float]]:
        return contexts(company, items)

    def untrained() -> list[dict]:
        hits, retrieval = found()
        return [row for arm, context in (("base", "none"), ("RAG", "RAG"), ("oracle", "oracle"), ("shuffled", "shuffled"))
                for row in answer_rows(arm, 0, company.base, items, hits[context], retrieval)]

    rows = part("answers-untrained", untrained)
    for seed in seeds:
        def trained(seed: int = seed) -> list[dict]:
            out: list[dict] = []
            hits, retrieval = found()
            llm = merged(company.adapter("april", seed)[0])
            out += answer_rows("fine-tuned", seed, llm, items, hits["none"], retrieval)
            out += answer_rows("both", seed, llm, items, hits["RAG"], retrieval)
            llm = merged(company.adapter("raft", seed)[0])
            return out + answer_rows("RAFT", seed, llm, items, hits["RAG"], retrieval)
        rows += part(f"answers-{seed}", trained)
    return pd.DataFrame(rows)


def costs(company: Company, seeds: Sequence[int]) -> pd.DataFrame:
    """What each arm costs: training, FLOPs, latency of single questions, memory, disk."""
    items = [i for i in load_items() if i.kind == "lookup"][:30]
    hits, retrieval = contexts(company, items)
    rows = []
    size = lambda folder: sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors")) / 1e6  # noqa: E731
    for arm, name, context in (("base", "", "none"), ("RAG", "", "RAG"), ("fine-tuned", "april", "none"), ("both", "april", "RAG"),
                               ("RAFT", "raft", "RAG")):
        for seed in seeds if name else (0,):
            llm, info = company.base, {"seconds": 0.0, "tokens": 0}
            if name:
                tuned_llm, info = company.adapter(name, seed)
                llm = merged(tuned_llm)
            parameters = sum(p.numel() for p in llm.model.parameters())
            traces = [Rag(llm, None).ask([i.text], hits=[h])[0] for i, h in zip(items, hits[context])]
            single = [t.generation.seconds + (r if context == "RAG" else 0.0) for t, r in zip(traces, retrieval)]
            tokens = float(np.mean([t.generation.prompt_tokens + t.generation.new_tokens for t in traces]))
            rows.append({"arm": arm, "seed": seed, "training_seconds": info["seconds"], "training_tokens": info["tokens"],
                         "training_flops": training_flops(parameters, info["tokens"], lora=True),
                         "flops_per_answer": inference_flops(parameters, tokens), "tokens_per_answer": round(tokens, 1),
                         "p50_ms": percentile_ms(single, 50), "p95_ms": percentile_ms(single, 95),
                         "peak_mb": round(peak_memory_mb()),
                         "disk_mb": round(size(DATA / "course_lm") + (size(ADAPTERS / f"{name}-{seed}") if name else 0), 1)})
    return pd.DataFrame(rows)


# -- lesson 03 ---------------------------------------------------------------------------------------------------------
def fact_items(facts: Sequence[Any], questions: Sequence[Any]) -> list[Item]:
    """Closed-book questions on facts."""
    chosen = {f.id: f for f in facts}
    return [Item(q.id, q.fact, "lookup", q.text, (chosen[q.fact].value, *chosen[q.fact].also)) for q in questions if q.fact in chosen]


def closed_book(llm: LanguageModel, items: Sequence[Item]) -> pd.DataFrame:
    """Scores of the items without any passage."""
    return score_answers(items, [g.text for g in llm.generate([llm.prompt(i.text) for i in items], 32)])


def forgetting(llm: LanguageModel, pairs: Sequence[Pair]) -> dict[str, float]:
    """Shares of right answers on general facts, reading and abstention, and the perplexity of the right answers."""
    texts = [g.text for g in llm.generate([llm.prompt(p.question, p.passages) for p in pairs], 32)]
    items = [Item(str(i), str(i), p.kind, p.question, () if p.answer is None else (p.answer,)) for i, p in enumerate(pairs)]
    right = score_answers(items, texts)["correct"].astype(float).to_numpy()
    kinds = np.array([p.kind for p in pairs])
    return {"general_facts": float(right[kinds == "fact"].mean()), "reading": float(right[kinds == "reading"].mean()),
            "abstains": float(right[np.isin(kinds, ["unanswerable", "no passage"])].mean()),
            "perplexity": float(np.exp(answer_nll(llm, pairs)))}


def ablations(company: Company, seeds: Sequence[int], backwards: bool = False) -> pd.DataFrame:
    """Variants of one small fine-tuning run: 40 facts asked about, 40 only stated."""
    facts = list(company.april_facts.values())
    asked, unasked = [f for f in facts if f.asked][::6][:40], [f for f in facts if not f.asked][::6][:40]
    questions = company.train_questions + load_questions("held_out", "2026-04-01")
    wordings: dict[str, list[str]] = {}
    for q in sorted(questions, key=lambda q: q.wording):
        wordings.setdefault(q.fact, []).append(q.text)
    last = [q for q in questions if q.wording == 6]
    learnt_items, unasked_items = fact_items(asked, last), fact_items(unasked, last)
    held_out = load_pairs(DATA / "general" / "held_out.jsonl", limit=140)
    replay = load_pairs(limit=120)

    def pairs(per_fact: int = 3, orders: int = 2, with_replay: bool = False) -> list[Pair]:
        known = {f.id: wordings[f.id] for f in asked} if per_fact else {}
        return fact_pairs([*asked, *unasked], known, per_fact, orders) + (replay if with_replay else [])

    same = dataclasses.replace
    variants: list[tuple[str, str, list[Pair] | None, Recipe]] = [
        ("base", "base", None, ABLATION),
        ("wordings", "1 wording", pairs(1), ABLATION), ("wordings", "3 wordings", pairs(3), ABLATION),
        ("wordings", "5 wordings", pairs(5), ABLATION),
        ("order", "1 order, no questions", pairs(0, 1), ABLATION), ("order", "4 orders, no questions", pairs(0, 4), ABLATION),
        ("rank", "rank 4", pairs(3), same(ABLATION, rank=4, alpha=8)), ("rank", "rank 16", pairs(3), ABLATION),
        ("rank", "rank 64", pairs(3), same(ABLATION, rank=64, alpha=128)),
        ("targets", "attention only", pairs(3), same(ABLATION, targets=("query", "key", "value"))),
        ("targets", "all linear", pairs(3), ABLATION),
        ("method", "LoRA", pairs(3), ABLATION), ("method", "full", pairs(3), same(ABLATION, full=True, rate=2e-4)),
        ("replay", "without", pairs(3), ABLATION), ("replay", "with", pairs(3, with_replay=True), ABLATION)]
    rows, done = [], {}
    for seed in seeds:
        for group, variant, data, recipe in variants[::-1] if backwards else variants:
            if data is None and seed != seeds[0]:
                continue
            recipe = same(recipe, seed=seed)
            key = hashlib.sha256(repr((data, recipe)).encode()).hexdigest()[:12]

            def run(data=data, recipe=recipe) -> list[dict]:
                llm, history = load_llm(), None
                parameters = sum(p.numel() for p in llm.model.parameters())
                trainable = 0
                if data is not None:
                    wrap(llm, recipe)
                    trainable = sum(p.numel() for p in llm.model.parameters() if p.requires_grad)
                    history = tune(llm, data, recipe, label=variant)
                    llm = merged(llm)
                scores = closed_book(llm, learnt_items)
                learnt = bootstrap(scores["correct"], scores["cluster"])
                return [{"trainable": trainable, "parameters": parameters,
                         "seconds": 0.0 if history is None else round(float(history.seconds.iloc[-1]), 1),
                         "tokens": 0 if history is None else int(history.tokens.iloc[-1]),
                         "learnt": learnt.mean, "learnt_low": learnt.low, "learnt_high": learnt.high,
                         "unasked": float(closed_book(llm, unasked_items)["correct"].mean()), **forgetting(llm, held_out)}]

            if key not in done:
                done[key] = part(f"ablation-{key}", run)[0]
                print(f"  {variant}, seed {seed}: learnt {done[key]['learnt']:.0%}, {done[key]['seconds']:.0f} s", flush=True)
            rows.append({"group": group, "variant": variant, "seed": seed, **done[key]})
    return pd.DataFrame(rows)


def triage(answers_table: pd.DataFrame) -> pd.DataFrame:
    """The held-out tickets by arm and seed, from the side-by-side answers (few-shot RAG is the arm RAG)."""
    rows = []
    for (arm, seed), scores in answers_table[answers_table.kind == "triage"].groupby(["arm", "seed"]):
        if arm in ("base", "RAG", "fine-tuned"):
            interval = bootstrap(scores["correct"], scores["cluster"])
            rows.append({"arm": "few-shot RAG" if arm == "RAG" else arm, "seed": seed, "correct": interval.mean, "low": interval.low,
                         "high": interval.high, "n": len(scores)})
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ablation-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=("answers", "ablations"), help="make one table only (for two processes side by side)")
    parser.add_argument("--backwards", action="store_true", help="the ablations from the last, beside another process; writes no table")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args(arguments)
    seed_everything(0)
    company = Company()
    if args.backwards:
        ablations(company, args.ablation_seeds, backwards=True)
        return
    if args.only != "answers":
        table("ablations", args.ablation_seeds, lambda: ablations(company, args.ablation_seeds))
    if args.only == "ablations":
        return
    given = table("answers", args.seeds, lambda: answers(company, args.seeds))
    table("triage", args.seeds, lambda: triage(given))
    table("costs", args.seeds, lambda: costs(company, args.seeds))


if __name__ == "__main__":
    main()
