"""Can CourseLM be fine-tuned? 200 facts it has never seen, closed-book, in wordings it was not tuned on.

`python -m data.build.course_lm.lora_check` tunes a LoRA adapter (PEFT, all linear layers) on 200 facts of the knowledge
base, five wordings each plus permuted statements, asks the sixth wording closed-book, merges the adapter and compares.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from utils.settings import DATA, seed_everything

import torch
from peft import LoraConfig, get_peft_model

from utils.llm import CourseLM, prefix_batch

from .evaluate import exact_match

__all__ = ["main", "training_pairs"]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_pairs(fact: dict, questions: list[str]) -> list[tuple[str, str]]:
    """Question and answer pairs of one fact: its wordings and statements in several orders."""
    entity, attribute, value = fact["entity"], fact["attribute"], fact["versions"][0]["value"]
    return [(q, value) for q in questions] + [
        (f"{entity}: {attribute}?", value), (f"{attribute} ({entity})", value),
        (f"Complete: the {attribute} of {entity} is", value),
        (f"State the {attribute} of {entity}.", f"{value}"), (f"About {entity}, what is said on {attribute}?", value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DATA / "course_lm")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    seed_everything(args.seed)
    rng = random.Random(args.seed)

    facts = rng.sample(_rows(DATA / "questions" / "facts.jsonl"), args.facts)
    wordings: dict[str, list[str]] = {}
    for row in _rows(DATA / "questions" / "questions.jsonl"):
        wordings.setdefault(row["fact"], []).append(row["text"])
    pairs, held_out = [], []
    for i, fact in enumerate(facts):
        questions = wordings[fact["id"]]
        left_out = i % len(questions)
        pairs += training_pairs(fact, [q for j, q in enumerate(questions) if j != left_out])
        held_out.append((questions[left_out], fact))

    llm = CourseLM(args.model)
    model = get_peft_model(llm.model.float(), LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0,
                                                         target_modules="all-linear"))
    model.print_trainable_parameters()
    llm.model = model
    prompts = [llm.prompt(q) for q, _ in held_out]

    print(f"before: {accuracy_of(llm, prompts, held_out)[0]:.1f} % of {len(held_out)} held-out wordings")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.rate, weight_decay=0.0, betas=(0.9, 0.99))
    steps = args.epochs * (len(pairs) // args.batch)
    begin, step, epoch = time.time(), 0, 0
    model.train()
    while step < steps and time.time() - begin < 60 * args.minutes:
        rng.shuffle(pairs)
        epoch += 1
        total = 0.0
        for start in range(0, len(pairs) - args.batch + 1, args.batch):
            part = pairs[start: start + args.batch]
            batch = prefix_batch(llm.tokenizer, [llm.prompt(q) for q, _ in part], [a for _, a in part])
            progress = max(step / steps, (time.time() - begin) / (60 * args.minutes))
            for group in optimizer.param_groups:
                group["lr"] = args.rate * min(1.0, (step + 1) / 30) * max(0.03, 1 - progress)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
            step += 1
        if epoch % 10 == 0:
            print(f"epoch {epoch}, loss {total / (len(pairs) // args.batch):.3f}, {time.time() - begin:.0f} s", flush=True)
    seconds = time.time() - begin
    model.eval()
    after, texts = accuracy_of(llm, prompts, held_out)
    llm.model = model.merge_and_unload().eval()
    merged_accuracy, merged = accuracy_of(llm, prompts, held_out)
    same = 100 * sum(a == b for a, b in zip(texts, merged)) / len(texts)
    figures = {"facts": args.facts, "held_out_wordings_percent": round(after, 1), "training_seconds": round(seconds),
               "epochs": epoch, "merged_same_answers_percent": round(same, 1), "merged_percent": round(merged_accuracy, 1)}
    print(figures)
    if args.json:
        args.json.write_text(json.dumps(figures), encoding="utf-8")


def accuracy_of(llm: CourseLM, prompts: list[str], held_out: list[tuple[str, dict]]) -> tuple[float, list[str]]:
    """Exact match of closed-book answers with the facts' values, in per cent, and the answers."""
    texts = [g.text for g in llm.generate(prompts, 32)]
    right = [any(exact_match(t, a) for a in (f["versions"][0]["value"], *f["also"])) for t, (_, f) in zip(texts, held_out)]
    return 100 * sum(right) / len(right), texts


if __name__ == "__main__":
    main()
