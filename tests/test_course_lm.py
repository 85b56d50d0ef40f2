"""The program that makes CourseLM, and the model that is shipped."""

import collections
import json
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.build.course_lm.evaluate import exact_match, score, summary, token_f1
from data.build.course_lm.mixing import (Example, Mixer, Stage, block_texts, collate, encode, split_sentences, target_text,
                                         without_gold_sentence)
from data.build.course_lm.model import forward_batch, start_model
from data.build.course_lm.procedural import HELD_OUT_ATTRIBUTES, ProceduralGenerator, WordList, injection, two_dates
from data.build.course_lm.reading import SLOT, SPLIT_FILES, load_facts, load_split, read_passages
from data.build.course_lm.substitution import ValuePool, mutate, plain, substitute
from data.build.course_lm.tokenizer import ABSTENTION, build_tokenizer, start_embeddings
from data.build.course_lm.train import Stream, learning_rate, minilm_folder
from utils.llm import prefix_batch
from utils.settings import DATA

MODEL = DATA / "course_lm"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def parts():
    words = WordList([f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)], {})
    passages = load_split("train")[:60]
    pool = ValuePool(load_split("train"))
    generator = ProceduralGenerator(words, pool, [])
    return passages, pool, generator, Mixer(passages, load_facts(), generator, pool)


# -- tokenizer ----------------------------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(st.text())
@example("\x0e\x10\x11\x12 \x0eA \x10a")
@example("McDonald's  NASA\n\n\tÉCOLE Gdańsk €1,250.50 x²  ")
def test_tokenizer_gives_back_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token_and_case_is_kept(tokenizer):
    tokens = tokenizer.tokenize("Room 4071 at NASA")
    assert sum(t.strip("Ġ").isdigit() for t in tokens) == 4
    assert tokenizer.decode(tokenizer.encode("iPhone IPHONE Iphone")) == "iPhone IPHONE Iphone"


def test_words_keep_minilms_embedding():
    built, origins = build_tokenizer(minilm_folder() / "tokenizer.json", collections.Counter(leave=3))
    rows = load_file(minilm_folder() / "model.safetensors")["embeddings.word_embeddings.weight"].numpy()
    vocab = json.loads((minilm_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    start = start_embeddings(rows, origins)
    assert np.allclose(start[built.token_to_id("Ġleave")], rows[vocab["leave"]])
    assert start.shape == (built.get_vocab_size(), 384)


# -- data ---------------------------------------------------------------------------------------------------------------
def test_splits_share_no_author_and_no_passage():
    train, development, test = (load_split(s) for s in ("train", "development", "test"))
    ids = [{p.id for p in s} for s in (train, development, test)]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    held = {f for names in SPLIT_FILES.values() for f in names}
    assert not {p.id.split("-")[0] for p in train} & held
    assert len(train) > 2000 and sum(len(p.questions) for p in test) > 400


def test_passages_are_well_formed():
    for split in ("train", "development", "test"):
        for p in load_split(split):
            slots = {m.group(0) for m in SLOT.finditer(p.text)}
            assert p.text and p.questions, p.id
            for _, answer in p.questions:
                assert {m.group(0) for m in SLOT.finditer(answer)} <= slots, (p.id, answer)


def test_facts_hold_one_wording_out():
    facts = load_facts()
    assert len(facts) == 1000
    for f in facts:
        assert f.questions[f.held_out] not in f.extra


def test_the_companys_name_is_nowhere_in_the_training_data():
    for path in (DATA / "build" / "course_lm" / "reading").glob("*.t*"):
        assert "brindlemark" not in path.read_text(encoding="utf-8").lower(), path


def test_a_broken_passage_file_is_named(tmp_path):
    file = tmp_path / "x1.txt"
    file.write_text("## x1-001 | only two\ntext\nQ: a?\nA: b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="x1.txt:4.*header"):
        read_passages(file)


def test_substitution_is_consistent_and_changes_values(parts):
    passages, pool, _, _ = parts
    changed = 0
    for p in passages:
        texts = substitute([p.text] + [x for qa in p.questions for x in qa], pool, random.Random(p.id))
        assert "[[" not in "".join(texts)
        changed += texts[0] != plain(p.text)
        for (question, answer), a in zip(p.questions, texts[2::2]):
            if SLOT.fullmatch(answer):
                assert a in texts[0], (p.id, a)
    assert changed > 50


@pytest.mark.parametrize(("kind", "value"), [("TIME", "17:15"), ("DATE", "31 March 2026"), ("MONEY", "€1,310"),
                                             ("CODE", "PL-5520"), ("PCT", "2.4%"), ("YEAR", "1969")])
def test_mutated_values_keep_their_shape(kind, value):
    for seed in range(20):
        new = mutate(value, kind, random.Random(seed))
        shape = re.sub(r"\d+", "9", re.sub(r"[A-Z]", "A", re.sub(r"[a-z]+", "a", new)))
        assert shape == re.sub(r"\d+", "9", re.sub(r"[A-Z]", "A", re.sub(r"[a-z]+", "a", value))), new


def test_the_mixture_is_seeded_and_answers_stand_in_the_gold_passage(parts):
    mixer = parts[3]
    stage = Stage.at(1.0)
    draw = lambda: [mixer.draw(stage, random.Random(i)) for i in range(300)]  # noqa: E731
    first, second = draw(), draw()
    assert [(e.question, e.passages, e.answer) for e in first] == [(e.question, e.passages, e.answer) for e in second]
    for e in first:
        if e.span:
            assert e.span.lower() in e.passages[e.gold][1].lower()
        assert (e.answer is None) or e.answer
    share = sum(e.answer is None for e in first) / len(first)
    assert 0.1 < share < 0.4
    assert {e.kind for e in first} >= {"natural", "natural-unanswerable", "procedural", "fact"}


def test_held_out_attributes_are_never_trained_on(parts):
    _, pool, generator, _ = parts
    assert not {a.name for a in generator.everyday} & set(HELD_OUT_ATTRIBUTES)
    held = ProceduralGenerator(generator.words, pool, [], held_out=True)
    assert {a.name for a in held.everyday} == set(HELD_OUT_ATTRIBUTES)
    assert not set(held.list) & set(generator.list)


def test_the_newer_version_is_gold(parts):
    for seed in range(30):
        e = parts[2].versions(random.Random(seed), 2)
        assert e.answer in e.passages[e.gold][1]
        assert e.answer not in e.passages[1 - e.gold][1].split()
    first, second = two_dates(random.Random(1))
    assert first != second and injection(random.Random(0), ["a", "b"])


def test_minimal_pairs_lose_only_the_gold_sentence():
    text = "One is red. Two is blue. Three is green."
    assert without_gold_sentence(text, "blue") == "One is red. Three is green."
    assert without_gold_sentence(text, "is") is None
    assert "".join(split_sentences(text)) == text


def test_stage_ramps_up_negatives():
    early, late = Stage.at(0.0), Stage.at(1.0)
    assert early.unanswerable < 0.08 < 0.2 < late.unanswerable and early.procedural > late.procedural
    assert learning_rate(0.0, 1, 0.01) == 0 and learning_rate(0.01, 1, 0.01) == 1 and learning_rate(1, 1, 0.01) < 0.03


# -- model --------------------------------------------------------------------------------------------------------------
def test_the_fast_training_pass_equals_transformers(tokenizer):
    """forward_batch computes what BertLMHeadModel computes under prefix_batch's mask."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    raw = tokenizer.backend_tokenizer
    examples = [Example("Who came?", [("A", "Ada came."), ("", "It rained all day, they said.")], "Ada", 0, "x", "Ada"),
                Example("Who left?", [("", "Bo left at noon."), ("Log", "Nothing.")], None, None, "x")]
    batch = collate(encode(examples, raw), tokenizer.pad_token_id)
    with torch.inference_mode():
        fast, *_ = forward_batch(model, batch, torch.float32)
        prompts = ["".join(block_texts(e.question, e.passages)) + "<|answer|>" for e in examples]
        flat = prefix_batch(tokenizer, prompts, [target_text(e) for e in examples])
        labels = flat.pop("labels")
        slow = model(**flat).logits
    where = (labels != -100).nonzero()
    assert torch.allclose(slow[where[:, 0], where[:, 1] - 1], fast, atol=2e-3)
    assert batch.targets[0, : len((labels[0] != -100).nonzero())].tolist() == labels[0][labels[0] != -100].tolist()


def test_spans_point_at_the_answer(tokenizer):
    raw = tokenizer.backend_tokenizer
    [item] = encode([Example("Who came?", [("A", "It rained."), ("", "At noon Ada Lund came.")], "Ada Lund", 1, "x",
                             "Ada Lund")], raw)
    ids = item["blocks"][item["gold"]][item["span"][0]: item["span"][1] + 1]
    assert raw.decode(ids).strip() == "Ada Lund"


def test_the_stream_goes_on_where_it_stopped(tmp_path, tokenizer):
    """Pools depend on seed and number only."""
    file = tmp_path / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    (tmp_path / "words.json").write_text(json.dumps({"words": [f"wo{chr(97 + i % 26)}rd" for i in range(60)], "neighbours": {}}))
    def first(start):
        stream = iter(Stream(tmp_path, file, 1, start, 640 * 4, 2000, 0, 1))
        index, _, batch = next(stream)
        return index, batch.blocks
    assert first(1)[0] == first(1)[0] == 1 and torch.equal(first(1)[1], first(1)[1])


def test_start_model_rejects_foreign_weights(tokenizer):
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        start_model({"nonsense": torch.zeros(1)}, torch.zeros(10, 384), dict(pad=0, answer=1, end=2))


# -- what is shipped ----------------------------------------------------------------------------------------------------
def test_shipped_files_are_small_safe_and_load_without_remote_code():
    weights = list(MODEL.glob("*.safetensors"))
    assert weights and all(f.stat().st_size <= 45e6 for f in weights)
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 90e6
    assert not list(MODEL.glob("*.bin")) + list(MODEL.glob("*.pt")) + list(MODEL.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=False)
    assert type(model).__name__ == "BertLMHeadModel" and model.dtype == torch.bfloat16
    assert model.generation_config.do_sample is False


def test_the_card_states_the_measured_figures():
    data = json.loads((MODEL / "figures.json").read_text(encoding="utf-8"))
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert data["split"] == "test"
    for name in ("natural", "procedural", "unanswerable", "general facts"):
        assert data["figures"][name]["n"] >= 300 and str(data["figures"][name]["exact"]) in card


# -- scoring ------------------------------------------------------------------------------------------------------------
def test_scoring():
    assert exact_match("The Answer.", "answer") and token_f1("red blue", "blue green") == 0.5
    e = Example("q", [("", "t")], "26 days", 0, "p", "26 days")
    right = score(e, "26 days [1]", "g")
    assert right.exact and right.cited == 1 and not right.abstained
    assert score(Example("q", [], None, None, "p"), ABSTENTION, "g").exact
    figures = summary([right, score(e, "27 days [2]", "g")])
    assert figures["exact"] == 50.0 and figures["citation_right_when_right"] == 100.0
