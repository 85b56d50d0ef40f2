"""Can CourseLM be fine-tuned? 200 facts it has never seen, closed-book, in wordings it was not tuned on.

`python -m data.build.course_lm.lora_check` tunes a LoRA adapter (PEFT, all linear layers) on 200 facts of the knowledge
base, five wordings each plus permuted statements, asks the sixth wording closed-book, merges the adapter and compares.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from utils.settings import DATA, seed_everything

from utils.evaluation import Item, bootstrap, load_facts, load_questions, score_answers
from utils.finetuning import Pair, Recipe, fact_pairs, merged, tune, wrap
from utils.llm import CourseLM

__all__ = ["main", "lora_task"]

SNAPSHOT = "2026-04-01"


def lora_task(count: int, seed: int) -> tuple[list[Pair], list[Item]]:
    """Training pairs of `count` facts (five wordings and four statements each) and the wordings left out, one a fact."""
    facts = random.Random(seed).sample(list(load_facts(SNAPSHOT).values()), count)
    wordings: dict[str, list[str]] = {}
    for split in ("train", "held_out"):
        for question in load_questions(split, SNAPSHOT):
            wordings.setdefault(question.fact, []).append(question.text)
    pairs, items = [], []
    for i, fact in enumerate(facts):
        out = i % len(wordings[fact.id])
        kept = [text for j, text in enumerate(wordings[fact.id]) if j != out]
        pairs += fact_pairs([fact], {fact.id: kept}, per_fact=5, orders=4)
        items.append(Item(fact.id, fact.id, "lookup", wordings[fact.id][out], (fact.value, *fact.also)))
    return pairs, items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DATA / "course_lm")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=14)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    seed_everything(args.seed)
    pairs, items = lora_task(args.facts, args.seed)
    recipe = Recipe(rank=args.rank, alpha=2 * args.rank, rate=args.rate, epochs=args.epochs, batch=args.batch, seed=args.seed)

    def answers(llm: CourseLM) -> list[str]:
        return [g.text for g in llm.generate([llm.prompt(item.text) for item in items], 32)]

    llm = CourseLM(args.model)
    before = score_answers(items, answers(llm))
    print(f"before: {before['correct'].mean():.1%} of {len(items)} held-out wordings", flush=True)
    wrap(llm, recipe)
    history = tune(llm, pairs, recipe, every=100, watch=lambda step, h: print(
        f"step {step}, loss {h.loss.tail(50).mean():.3f}, {h.seconds.iloc[-1]:.0f} s", flush=True))
    texts = answers(llm)
    merged_texts = answers(merged(llm))
    exact, correct = (score_answers(items, texts)[c].astype(float) for c in ("exact", "correct"))
    interval = bootstrap(exact, [item.cluster for item in items])
    figures = {"facts": args.facts, "held_out_wordings_percent": round(100 * interval.mean, 1),
               "held_out_wordings_low": round(100 * interval.low, 1), "held_out_wordings_high": round(100 * interval.high, 1),
               "contained_percent": round(100 * float(correct.mean()), 1),
               "training_seconds": round(float(history.seconds.iloc[-1])), "epochs": args.epochs,
               "merged_same_answers_percent": round(100 * sum(a == b for a, b in zip(texts, merged_texts)) / len(texts), 1),
               "merged_percent": round(100 * float(score_answers(items, merged_texts)["exact"].mean()), 1)}
    print(figures)
    if args.json:
        args.json.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
