"""Fine-tuning: from facts and tickets to training pairs, LoRA or full training in a loop to read, adapters on disk.

PEFT makes and holds the adapters; the loop is plain PyTorch. What is trained is a `LanguageModel` of this course:
CourseLM, or any causal or encoder-decoder model of transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from tqdm.auto import tqdm

from .embedding import _has_bfloat16
from .llm import ABSTENTION, CourseLM, LanguageModel, Passage, load_llm, prefix_batch
from .rag import passages_of
from .settings import DATA, WORK, seed_everything, settings

__all__ = ["APRIL", "RAFT", "Pair", "Recipe", "adapter_path", "answer_nll", "april_pairs", "fact_pairs", "keep", "load_adapter",
           "load_pairs", "merged", "raft_pairs", "save_adapter", "statements", "training_batch", "tune", "tuned", "update_norms",
           "wrap"]

ADAPTERS = DATA / "adapters"


# -- training pairs ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """A question, with or without passages, and what the model should write.

    answer : None means the fixed abstention.
    gold : number of the passage to cite, counted from 1; None cites nothing.
    """

    question: str
    answer: str | None
    passages: tuple[Passage, ...] = ()
    gold: int | None = None
    kind: str = ""

    @property
    def target(self) -> str:
        """The text to be learnt, with its citation."""
        if self.answer is None:
            return ABSTENTION
        return f"{self.answer} [{self.gold}]" if self.gold else self.answer


def statements(fact: Any, orders: int = 4) -> list[Pair]:
    """A fact stated in up to four orders: attribute first, entity first, the document's own sentence, as a list entry.

    fact : an `evaluation.Fact` or anything with entity, attribute, value and evidence.
    """
    before = fact.evidence.partition(fact.value)[0].strip()
    texts = [f"Complete: the {fact.attribute} of {fact.entity} is", f"Complete: {fact.entity}, {fact.attribute}:",
             f"Complete: {before}" if len(before) > 12 else f"Complete: as to {fact.entity}, the {fact.attribute} is",
             f"{fact.attribute} ({fact.entity})"]
    return [Pair(text, fact.value, kind="statement") for text in texts[:orders]]


def fact_pairs(facts: Sequence[Any], wordings: Mapping[str, Sequence[str]], per_fact: int = 3,
               orders: int = 4) -> list[Pair]:
    """Pairs for facts: `orders` statements of each, and for those with `wordings` (by fact id) `per_fact` questions."""
    pairs = []
    for fact in facts:
        pairs += statements(fact, orders)
        pairs += [Pair(text, fact.value, kind="question") for text in wordings.get(fact.id, ())[:per_fact]]
    return pairs


def april_pairs(facts: Mapping[str, Any], questions: Sequence[Any], tickets: Sequence[tuple[str, str]],
                replay: int = 100) -> list[Pair]:
    """What the company's adapter learns in April: all facts as statements, half of them also as questions, triage, replay.

    Parameters
    ----------
    facts : by id, as they hold in April. questions : training wordings; only those of facts with `asked` are used.
    tickets : (question, code). replay : general examples against forgetting.
    """
    wordings: dict[str, list[str]] = {}
    for question in questions:
        if facts[question.fact].asked:
            wordings.setdefault(question.fact, []).append(question.text)
    return (fact_pairs(list(facts.values()), wordings, orders=2)
            + [Pair(text, code, kind="triage") for text, code in tickets] + (load_pairs(limit=replay) if replay else []))


def raft_pairs(facts: Mapping[str, Any], questions: Sequence[Any], hits: Sequence[Sequence[Any]],
               relevant: Mapping[str, set[str]]) -> list[Pair]:
    """Questions with what retrieval found for them, distractors included (RAFT; Zhang et al. 2024).

    The answer cites the passage in which it stands; where retrieval missed it, the target is the abstention.

    hits : retrieved chunks of each question (`NodeWithScore`). relevant : ids of the chunks that hold each fact.
    """
    pairs = []
    for question, found in zip(questions, hits, strict=True):
        gold = next((k for k, hit in enumerate(found, 1) if hit.node.node_id in relevant[question.fact]), None)
        pairs.append(Pair(question.text, facts[question.fact].value if gold else None, tuple(passages_of(found)), gold, "raft"))
    return pairs


def load_pairs(path: Path = DATA / "general" / "replay.jsonl", limit: int | None = None) -> list[Pair]:
    """General examples for replay or for measuring forgetting; `limit` takes every n-th, so that the kinds stay mixed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [Pair(r["question"], r["answer"], tuple(Passage(p["text"], p["title"]) for p in r["passages"]), r["gold"], r["kind"])
            for r in rows]


# -- training ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """How to train.

    rank, alpha, targets : LoRA's (Hu et al. 2021); "all-linear" or names of modules such as ("query", "value").
    rate : peak learning rate; LoRA wants about ten times that of full fine-tuning.
    full : train all parameters instead of an adapter.
    """

    rank: int = 16
    alpha: int = 32
    targets: str | tuple[str, ...] = "all-linear"
    rate: float = 2e-3
    epochs: float = 8
    batch: int = 32
    warmup: int = 20
    seed: int = 0
    full: bool = False


#: the recipes of lessons 03 and 04, tuned on training wordings held back from tuning
APRIL = Recipe(rank=16, alpha=32, rate=2e-3, epochs=5, batch=32)
RAFT = Recipe(rank=16, alpha=32, rate=1e-3, epochs=1, batch=16)


def wrap(llm: LanguageModel, recipe: Recipe) -> LanguageModel:
    """Make `llm` trainable in place: an adapter on a frozen base, or all parameters in float32. Returns it."""
    if getattr(llm, "model", None) is None:
        raise ValueError(f"{llm.name} is an endpoint: its weights are out of reach. Use a local model for fine-tuning.")
    seed_everything(recipe.seed)
    if isinstance(llm, CourseLM):
        llm.model.set_attn_implementation("eager")  # on CPUs faster than SDPA to train short texts
    if recipe.full:
        llm.model = llm.model.float().requires_grad_(True)
    else:
        targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
        llm.model = get_peft_model(llm.model, LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0,
                                                         target_modules=targets))
    return llm


def training_batch(llm: LanguageModel, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Tensors for one step, padded on the left so that all targets end in the last column.

    Returns `input_ids`, `attention_mask`, `labels` (-100 where nothing is to be learnt) and what else the model takes;
    rows are pairs. Encoder-decoder models get the target as labels of its own length.
    """
    prompts = [llm.prompt(p.question, p.passages) for p in pairs]
    if isinstance(llm, CourseLM):
        return prefix_batch(llm.tokenizer, prompts, [p.target for p in pairs], left=True)
    tokenizer, end = llm.tokenizer, llm.tokenizer.eos_token_id
    targets = [tokenizer.encode(p.target, add_special_tokens=False) + [end] for p in pairs]
    sources = [tokenizer.encode(p, add_special_tokens=llm.encoder_decoder) for p in prompts]
    if llm.encoder_decoder:
        width, most = max(map(len, sources)), max(map(len, targets))
        pad = tokenizer.pad_token_id
        return {"input_ids": torch.tensor([s + [pad] * (width - len(s)) for s in sources]),
                "attention_mask": torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sources]),
                "labels": torch.tensor([t + [-100] * (most - len(t)) for t in targets])}
    width = max(len(s) + len(t) for s, t in zip(sources, targets))
    if width > llm.context:
        raise ValueError(f"a training pair has {width} tokens; {llm.name} reads {llm.context}. Use fewer or smaller passages.")
    rows = [(width - len(s) - len(t), s, t) for s, t in zip(sources, targets)]
    return {"input_ids": torch.tensor([[tokenizer.pad_token_id] * gap + s + t for gap, s, t in rows]),
            "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap, _, _ in rows]),
            "labels": torch.tensor([[-100] * (gap + len(s)) + t for gap, s, t in rows])}


def _loss(llm: LanguageModel, batch: dict[str, torch.Tensor], reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy over the target tokens; the head computes only the columns that hold targets."""
    device = llm.model.device
    batch = {name: (tensor.to(llm.model.dtype) if tensor.is_floating_point() else tensor).to(device)
             for name, tensor in batch.items()}
    labels = batch.pop("labels")
    if getattr(llm, "encoder_decoder", False):
        logits = llm.model(**batch, labels=labels).logits
    else:
        keep = int((labels != -100).any(0).sum()) + 1
        logits = llm.model(**batch, logits_to_keep=keep).logits[:, -keep:-1]
        labels = labels[:, 1 - keep:]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)


def _autocast(llm: LanguageModel) -> Any:
    return torch.autocast(llm.model.device.type, torch.bfloat16) if _has_bfloat16() else nullcontext()


def _batches(llm: LanguageModel, pairs: Sequence[Pair], size: int, rng: random.Random) -> list[list[Pair]]:
    """One epoch: shuffled, and within stretches of eight batches sorted by length, so that little is padded."""
    order = list(range(len(pairs)))
    rng.shuffle(order)
    length = [len(p.question) + sum(len(x.text) for x in p.passages) * 2 + len(p.target) for p in pairs]
    stretches = [sorted(order[i: i + 8 * size], key=length.__getitem__) for i in range(0, len(order), 8 * size)]
    batches = []
    for stretch in stretches:
        start = 0
        while start < len(stretch):  # at most `size` pairs and about 4,000 tokens
            stop = start + 1
            while stop < len(stretch) and stop - start < size and (stop - start + 1) * length[stretch[stop]] < 16_000:
                stop += 1
            batches.append([pairs[i] for i in stretch[start:stop]])
            start = stop
    rng.shuffle(batches)
    return batches


def tune(llm: LanguageModel, pairs: Sequence[Pair], recipe: Recipe,
         watch: Callable[[int, pd.DataFrame], None] | None = None, every: int = 25, label: str = "tuning") -> pd.DataFrame:
    """Train `llm` (made trainable by `wrap`) on the pairs with AdamW; the rate rises over `warmup` steps and falls linearly.

    Parameters
    ----------
    watch : called as watch(step, history so far) after every `every` steps, to plot or to measure; its time is not counted.

    Returns
    -------
    One row a step: `step`, `seconds` of training so far, `loss` (mean over the batch's target tokens, nats), `tokens` seen
    so far.
    """
    if not pairs:
        raise ValueError("tune() got no pairs; expected at least one")
    rng = random.Random(recipe.seed)
    epochs = [_batches(llm, pairs, recipe.batch, rng) for _ in range(math.ceil(recipe.epochs))]
    batches = [batch for epoch in epochs for batch in epoch]
    batches = batches[: max(1, round(len(batches) * recipe.epochs / math.ceil(recipe.epochs)))]
    trainable = [p for p in llm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.rate, weight_decay=0.0, betas=(0.9, 0.99))
    history: list[tuple[int, float, float, int]] = []
    seconds, tokens = 0.0, 0
    llm.model.train()
    for step, part in enumerate(tqdm(batches, desc=label, unit="step", leave=False), 1):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(step / recipe.warmup, max(0.02, 1 - (step - 1) / len(batches)))
        batch = training_batch(llm, part)
        with _autocast(llm):
            loss = _loss(llm, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - begin
        tokens += batch["input_ids"].numel()
        history.append((step, seconds, loss.item(), tokens))
        if watch is not None and (step % every == 0 or step == len(batches)):
            llm.model.eval()
            watch(step, _frame(history))
            llm.model.train()
    llm.model.eval()
    return _frame(history)


def _frame(history: list[tuple[int, float, float, int]]) -> pd.DataFrame:
    return pd.DataFrame(history, columns=["step", "seconds", "loss", "tokens"])


# -- looking at a tuned model ------------------------------------------------------------------------------------------
@torch.inference_mode()
def answer_nll(llm: LanguageModel, pairs: Sequence[Pair], batch: int = 32) -> float:
    """Mean negative log-likelihood (nats) of a target token given its prompt; its exponential is the perplexity."""
    total, count = 0.0, 0
    order = sorted(pairs, key=lambda p: len(p.question) + sum(len(x.text) for x in p.passages))
    for start in range(0, len(order), batch):
        tensors = training_batch(llm, order[start: start + batch])
        count += int((tensors["labels"] != -100).sum())
        total += float(_loss(llm, tensors, "sum"))
    return total / count


@torch.no_grad()
def update_norms(model: PeftModel) -> pd.DataFrame:
    """How far each adapted matrix moved: columns `layer` (-1 outside the layers), `module` (its name within the layer) and
    `update` = ‖ΔW‖ / ‖W‖ (Frobenius norms)."""
    rows = []
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and model.active_adapter in getattr(module, "lora_A", {}):
            delta, weight = module.get_delta_weight(model.active_adapter).float(), module.get_base_layer().weight.float()
            parts = name.split(".")
            at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
            layer, inside = (-1, parts[-2:]) if at is None else (int(parts[at]), parts[at + 1:])
            rows.append((layer, ".".join(inside), float(delta.norm() / weight.norm())))
    return pd.DataFrame(rows, columns=["layer", "module", "update"])


def merged(llm: LanguageModel) -> LanguageModel:
    """The same model with the adapter added into its weights (computed in float32), ready to answer at full speed.

    `llm` itself is used up: its PEFT wrapper is taken off.
    """
    if isinstance(llm.model, PeftModel):
        llm.model = llm.model.float().merge_and_unload()
    dtype = torch.bfloat16 if _has_bfloat16() else torch.float32
    llm.model = llm.model.to(dtype).eval().requires_grad_(False)
    if isinstance(llm, CourseLM):
        llm.model.set_attn_implementation("sdpa")
    return llm


# -- adapters on disk --------------------------------------------------------------------------------------------------
def save_adapter(llm: LanguageModel, folder: Path) -> Path:
    """Write the adapter as safetensors in bfloat16, whole or not at all. Returns the folder."""
    from safetensors.torch import load_file, save_file

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    llm.model.save_pretrained(part)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = llm.name  # not a path of this machine
    (part / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    weights = part / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, folder)
    return folder


def load_adapter(llm: LanguageModel, folder: Path) -> LanguageModel:
    """Put a saved adapter on `llm` in place. Raises FileNotFoundError with the remedy."""
    if not (folder / "adapter_model.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds no adapter. Train it: COURSE_MODE=tiny in a notebook, or python course.py "
                                "results for the committed ones.")
    llm.model = PeftModel.from_pretrained(llm.model, folder).eval()
    return llm


def adapter_path(name: str, pairs: Sequence[Pair], recipe: Recipe) -> Path:
    """Where the adapter for exactly these pairs, recipe and base weights is kept in the work folder."""
    digest = hashlib.sha256(repr((sorted(asdict(recipe).items()), settings.llm, list(pairs))).encode())
    sums = DATA / "course_lm" / "SHA256SUMS"
    digest.update(sums.read_bytes() if settings.llm == "course-lm" and sums.exists() else b"")
    return WORK / "adapters" / f"{name}-{recipe.seed}-{digest.hexdigest()[:12]}"


def tuned(name: str, pairs: Sequence[Pair], recipe: Recipe, label: str = "") -> tuple[LanguageModel, dict[str, Any]]:
    """A fresh model with the adapter `name` on it, and how it was trained (`seconds`, `tokens`, `steps`).

    Mode replay loads the committed adapter; otherwise it is trained now, unless the work folder holds the one for the same
    pairs, recipe and base weights.
    """
    llm = load_llm()
    folder = ADAPTERS / f"{name}-{recipe.seed}" if settings.mode == "replay" else adapter_path(name, pairs, recipe)
    if settings.mode != "replay" and not (folder / "training.json").exists():
        history = tune(wrap(llm, recipe), pairs, recipe, label=label or name)
        keep(llm, folder, history)
        llm = load_llm()  # from the file, so that a kept and a fresh adapter answer alike
    return load_adapter(llm, folder), json.loads((folder / "training.json").read_text(encoding="utf-8"))


def keep(llm: LanguageModel, folder: Path, history: pd.DataFrame) -> Path:
    """Save the adapter and beside it history.csv and, last, training.json: seconds, tokens and steps of its training."""
    save_adapter(llm, folder)
    history.to_csv(folder / "history.csv", index=False)
    last = history.iloc[-1]
    text = json.dumps({"seconds": round(float(last.seconds), 1), "tokens": int(last.tokens), "steps": int(last.step)})
    part = folder / "training.json.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, folder / "training.json")
    return folder
