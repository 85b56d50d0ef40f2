"""utils.finetuning: training pairs, the training loop, adapters on disk, for CourseLM and for models of transformers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from utils import finetuning as module
from utils.evaluation import load_facts, load_questions, load_tickets, normalise, raft_sample, triage_question
from utils.finetuning import (APRIL, RAFT, Pair, Recipe, adapter_path, answer_nll, april_pairs, fact_pairs, keep, load_adapter,
                              load_pairs, merged, raft_pairs, save_adapter, statements, training_batch, tune, tuned, update_norms,
                              wrap)
from utils.llm import ABSTENTION, CourseLM, EndpointModel, Passage, TransformersModel, prefix_batch
from utils.settings import DATA

FACT = SimpleNamespace(id="x-1", entity="the Heron", attribute="top speed", value="2.1 m/s",
                       evidence="On a dry floor the Heron reaches 2.1 m/s with an empty tray", asked=True)
PAIRS = [Pair("Which colour has the gate?", "green"), Pair("Who keeps the key?", "Ada Quill"), Pair("When is tea?", "at four"),
         Pair("How wide is the ramp?", "1.4 m")]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def checkpoint(folder, kind: str = "llama") -> TransformersModel:
    """A tiny random model with a real tokenizer file, loaded as one of a hub would be."""
    torch.manual_seed(0)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [p.question for p in PAIRS] + [p.target for p in PAIRS] + ["Answer as briefly as possible."]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                       special_tokens=["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", model_max_length=512)
    tokenizer.chat_template = CHATML if kind == "llama" else None
    tokenizer.save_pretrained(folder)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    else:
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=len(tokenizer), d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0,
            eos_token_id=1, pad_token_id=0))
    model.save_pretrained(folder)
    return TransformersModel(str(folder))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def april():
    facts, questions = load_facts("2026-04-01"), load_questions("train", "2026-04-01")
    labelled = [(triage_question(t.text), t.code) for t in load_tickets("train")]
    return facts, questions, april_pairs(facts, questions, labelled)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty work folder and, for replay, an empty folder of committed adapters."""
    monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(module, "ADAPTERS", tmp_path / "committed")
    return tmp_path


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- training pairs ----------------------------------------------------------------------------------------------------
def test_a_pairs_target_cites_or_abstains():
    assert Pair("q", "26 days").target == "26 days"
    assert Pair("q", "26 days", (Passage("x"), Passage("y")), gold=2).target == "26 days [2]"
    assert Pair("q", None).target == ABSTENTION


def test_statements_put_a_fact_in_four_orders_and_never_give_the_value_away():
    pairs = statements(FACT)
    assert [p.question for p in pairs] == ["Complete: the top speed of the Heron is", "Complete: the Heron, top speed:",
                                           "Complete: On a dry floor the Heron reaches", "top speed (the Heron)"]
    assert all(p.answer == FACT.value and p.kind == "statement" and FACT.value not in p.question for p in pairs)
    assert statements(FACT, orders=2) == pairs[:2] and statements(FACT, orders=0) == []


def test_a_statement_does_without_the_documents_sentence_where_the_value_begins_it():
    third = statements(SimpleNamespace(**{**vars(FACT), "evidence": "2.1 m/s is what it does"}))[2]
    assert third.question == "Complete: as to the Heron, the top speed is"


def test_fact_pairs_ask_only_where_there_are_wordings():
    other = SimpleNamespace(**{**vars(FACT), "id": "x-2"})
    pairs = fact_pairs([FACT, other], {"x-1": ["a?", "b?", "c?"]}, per_fact=2, orders=1)
    assert [(p.kind, p.question) for p in pairs] == [
        ("statement", "Complete: the top speed of the Heron is"), ("question", "a?"), ("question", "b?"),
        ("statement", "Complete: the top speed of the Heron is")]


def test_april_states_every_fact_twice_and_asks_the_asked_ones_thrice(april):
    facts, questions, pairs = april
    asked = sum(f.asked for f in facts.values())
    kinds = [p.kind for p in pairs]
    assert kinds.count("statement") == 2 * len(facts)
    assert kinds.count("question") == 3 * asked
    assert kinds.count("triage") == len(load_tickets("train"))
    assert len(pairs) == 2 * len(facts) + 3 * asked + kinds.count("triage") + 100
    values = {f.value for f in facts.values()}
    assert all(p.answer in values and not p.passages for p in pairs if p.kind in ("statement", "question"))


def test_april_contains_no_wording_that_is_held_out_and_no_question_on_an_unasked_fact(april):
    facts, questions, pairs = april
    trained = {normalise(p.question) for p in pairs}
    forbidden = load_questions("held_out", "2026-04-01") + [q for q in questions if not facts[q.fact].asked]
    assert not [q.text for q in forbidden if normalise(q.text) in trained]
    held_out = {normalise(triage_question(t.text)) for t in load_tickets("held_out")}
    assert not held_out & trained


def test_replay_can_be_left_out_and_its_examples_are_none_of_the_forgetting_test(april):
    facts, questions, _ = april
    assert {p.kind for p in april_pairs(facts, questions, [], replay=0)} == {"statement", "question"}
    replay, test = load_pairs(), load_pairs(DATA / "general" / "held_out.jsonl")
    assert not {(p.question, p.passages) for p in replay} & {(p.question, p.passages) for p in test}


def test_a_limited_load_keeps_the_kinds_mixed():
    everything, some = load_pairs(), load_pairs(limit=120)
    assert len(some) == 120 and {p.kind for p in some} == {p.kind for p in everything}
    assert load_pairs(limit=10 ** 6) == everything


def test_raft_pairs_cite_the_passage_of_the_answer_and_abstain_where_retrieval_missed(april):
    facts, questions, _ = april
    two = raft_sample(facts, questions, n=2)
    hit = lambda name: SimpleNamespace(node=SimpleNamespace(node_id=name, text=f"text of {name} ", metadata={  # noqa: E731
        "title": "Rules", "effective_date": "2026-01-01"}))
    relevant = {two[0].fact: {"good", "also good"}, two[1].fact: {"elsewhere"}}
    found, missed = raft_pairs(facts, two, [[hit("a"), hit("good"), hit("also good")], [hit("a"), hit("b")]], relevant)
    assert (found.question, found.gold, found.target) == (two[0].text, 2, f"{facts[two[0].fact].value} [2]")
    assert found.passages[1] == Passage("text of good", "Rules, effective 2026-01-01")
    assert (missed.gold, missed.target, len(missed.passages)) == (None, ABSTENTION, 2)


def test_raft_pairs_want_one_list_of_hits_a_question(april):
    facts, questions, _ = april
    with pytest.raises(ValueError):
        raft_pairs(facts, questions[:2], [[]], {questions[0].fact: set(), questions[1].fact: set()})


# -- batches -----------------------------------------------------------------------------------------------------------
MIXED = [Pair("Who?", "Ada"), Pair("How many days of leave are there?", "26 days", (
    Passage("Everyone gets 26 days.", "Leave"), Passage("The gate is green.")), gold=1), Pair("Where is the Zorvik?", None)]


def test_a_batch_for_course_lm_ends_in_the_targets_last_token():
    llm = CourseLM()
    batch = training_batch(llm, MIXED)
    rows, width = batch["input_ids"].shape
    assert rows == 3 and batch["labels"].shape == batch["position_ids"].shape == (3, width)
    assert batch["attention_mask"].shape == (3, 1, width, width)
    for labels, pair in zip(batch["labels"], MIXED):
        learnt = labels[labels != -100]
        assert labels[-1] != -100 and (labels[-len(learnt):] == learnt).all()
        assert llm.tokenizer.decode(learnt[:-1]) == pair.target
        assert learnt[-1] == llm.tokenizer.convert_tokens_to_ids("<|end|>")


def test_padding_on_the_left_and_on_the_right_give_the_same_loss():
    llm = CourseLM()
    llm.model.float()
    prompts, targets = [llm.prompt(p.question, p.passages) for p in MIXED], [p.target for p in MIXED]
    left, right = (prefix_batch(llm.tokenizer, prompts, targets, left=side) for side in (True, False))
    assert (left["labels"][:, -1] != -100).all() and not (right["labels"][:, -1] != -100).all()
    with torch.inference_mode():
        losses = [float(llm.model(**batch).loss) for batch in (left, right)]
        by_loop = float(module._loss(llm, dict(left)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert by_loop == pytest.approx(losses[0], abs=1e-4)


def test_a_batch_for_a_causal_model_learns_the_target_and_its_end(small_folder):
    llm = TransformersModel(str(small_folder))
    batch = training_batch(llm, PAIRS)
    assert {tensor.shape for tensor in batch.values()} == {batch["input_ids"].shape}
    for ids, mask, labels, pair in zip(*batch.values(), PAIRS):
        learnt = labels[labels != -100]
        assert llm.tokenizer.decode(learnt[:-1]) == pair.target and learnt[-1] == llm.tokenizer.eos_token_id == labels[-1]
        assert llm.tokenizer.decode(ids[mask.bool()]) == llm.prompt(pair.question) + pair.target + "</s>"
    with torch.inference_mode():
        assert float(module._loss(llm, dict(batch))) == pytest.approx(float(llm.model(**batch).loss), abs=1e-3)


def test_a_batch_for_an_encoder_decoder_has_labels_of_their_own_length(tmp_path):
    llm = checkpoint(tmp_path, "t5")
    batch = training_batch(llm, PAIRS)
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]
    assert llm.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "green</s>"
    before = answer_nll(llm, PAIRS)
    tune(wrap(llm, Recipe(rank=4, rate=1e-2, epochs=5, warmup=1)), PAIRS, Recipe(rank=4, rate=1e-2, epochs=5, warmup=1))
    assert answer_nll(llm, PAIRS) < before


def test_a_pair_that_does_not_fit_is_named(small_folder):
    llm = TransformersModel(str(small_folder))
    with pytest.raises(ValueError, match="reads 512"):
        training_batch(llm, [Pair("Why? " * 400, "so")])


# -- training ----------------------------------------------------------------------------------------------------------
def test_tuning_a_small_causal_model_teaches_it_the_pairs(small_folder):
    llm = TransformersModel(str(small_folder))
    frozen = weights(llm.model)
    recipe = Recipe(rank=8, alpha=16, rate=1e-2, epochs=60, batch=2, warmup=5)
    seen = []
    before = answer_nll(llm, PAIRS)
    history = tune(wrap(llm, recipe), PAIRS, recipe, watch=lambda step, h: seen.append((step, len(h), llm.model.training)), every=50)
    assert list(history.columns) == ["step", "seconds", "loss", "tokens"] and history["step"].tolist() == list(range(1, 121))
    assert history["tokens"].is_monotonic_increasing and history["seconds"].is_monotonic_increasing
    assert history["loss"].tail(5).mean() < 0.3 * history["loss"].head(5).mean()
    assert answer_nll(llm, PAIRS) < 0.3 * before
    assert seen == [(50, 50, False), (100, 100, False), (120, 120, False)] and not llm.model.training
    now = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in llm.model.named_parameters()}
    assert all(torch.equal(p, now[name]) for name, p in frozen.items()), "LoRA changed the base"


def test_course_lm_learns_a_handful_of_pairs_in_three_steps():
    llm = CourseLM()
    before = answer_nll(llm, PAIRS)
    recipe = Recipe(rank=4, alpha=8, rate=5e-3, epochs=3, batch=4, warmup=1)
    history = tune(wrap(llm, recipe), PAIRS, recipe)
    assert len(history) == 3 and history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert answer_nll(llm, PAIRS) < before


def test_the_same_seed_trains_the_same_model(small_folder):
    recipe = Recipe(rank=4, rate=1e-2, epochs=3, batch=2, warmup=1)
    losses = []
    for seed in (0, 0, 1):
        llm = TransformersModel(str(small_folder))
        same = replace(recipe, seed=seed)
        losses.append(tune(wrap(llm, same), PAIRS, same)["loss"].tolist())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("epochs, steps", [(1, 2), (2.5, 5), (0.1, 1)])
def test_epochs_may_be_broken(small_folder, epochs, steps):
    recipe = Recipe(rank=4, epochs=epochs, batch=2)
    assert len(tune(wrap(TransformersModel(str(small_folder)), recipe), PAIRS, recipe)) == steps


def test_every_pair_is_seen_once_an_epoch(small_folder):
    import random

    pairs = [Pair(f"Question {i}" + " x" * (i % 7), "yes") for i in range(45)]
    batches = module._batches(None, pairs, 4, random.Random(0))
    assert sorted(p.question for b in batches for p in b) == sorted(p.question for p in pairs)
    assert max(map(len, batches)) <= 4
    assert batches != module._batches(None, pairs, 4, random.Random(1))


def test_a_full_recipe_trains_all_parameters(small_folder):
    llm = TransformersModel(str(small_folder))
    before = weights(llm.model)
    recipe = Recipe(full=True, rate=1e-3, epochs=2, batch=4, warmup=1)
    wrap(llm, recipe)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in llm.model.parameters())
    tune(llm, PAIRS, recipe)
    assert all(not torch.equal(p, before[name].float()) for name, p in llm.model.named_parameters())


def test_a_recipe_names_its_targets_and_rank(small_folder):
    llm = wrap(TransformersModel(str(small_folder)), Recipe(rank=3, targets=("q_proj", "v_proj")))
    shapes = {n: p.shape for n, p in llm.model.named_parameters() if p.requires_grad and "lora_A" in n}
    assert len(shapes) == 2 * 2 and all(s[0] == 3 for s in shapes.values())
    assert {n.split(".")[-4] for n, p in llm.model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}


def test_what_cannot_be_trained_is_refused(small_folder):
    with pytest.raises(ValueError, match="no pairs"):
        tune(TransformersModel(str(small_folder)), [], APRIL)
    with pytest.raises(ValueError, match="endpoint"):
        wrap(EndpointModel("http://localhost:1/v1#x"), APRIL)


# -- adapters ----------------------------------------------------------------------------------------------------------
def small_adapter(folder, small_folder, seed: int = 0, pairs=PAIRS):
    recipe = Recipe(rank=4, alpha=8, rate=1e-2, epochs=30, batch=2, warmup=5, seed=seed)
    llm = TransformersModel(str(small_folder))
    history = tune(wrap(llm, recipe), pairs, recipe)
    return keep(llm, folder, history), llm, history


def answers(llm, pairs=PAIRS):
    return [g.text for g in llm.generate([llm.prompt(p.question) for p in pairs], 12)]


def test_an_adapter_comes_back_as_it_was_kept_and_merging_changes_no_answer(tmp_path, small_folder):
    folder, _, history = small_adapter(tmp_path / "a", small_folder)
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "history.csv", "training.json"]
    assert json.loads((folder / "training.json").read_text()) == {
        "seconds": round(history.seconds.iloc[-1], 1), "tokens": history.tokens.iloc[-1], "steps": 60}
    first, second = (load_adapter(TransformersModel(str(small_folder)), folder) for _ in range(2))
    assert answers(first) == answers(second) == [p.target for p in PAIRS]
    assert answers(first) != answers(TransformersModel(str(small_folder)))
    combined = merged(first)
    assert not hasattr(combined.model, "peft_config") and not any(p.requires_grad for p in combined.model.parameters())
    assert answers(combined) == answers(second)


def test_course_lm_answers_alike_before_and_after_merging(tmp_path):
    llm = CourseLM()
    recipe = Recipe(rank=4, alpha=8, rate=5e-3, epochs=6, batch=4, warmup=1)
    keep(llm, tmp_path / "a", tune(wrap(llm, recipe), PAIRS, recipe))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "course-lm"
    apart = load_adapter(CourseLM(), tmp_path / "a")
    together = merged(load_adapter(CourseLM(), tmp_path / "a"))
    asked = PAIRS + [p for p in MIXED if not p.passages]
    assert answers(apart, asked) == answers(together, asked)


def test_two_adapters_are_swapped_on_one_base(tmp_path, small_folder):
    others = [replace(p, answer="no") for p in PAIRS]
    one, _, _ = small_adapter(tmp_path / "one", small_folder)
    two, _, _ = small_adapter(tmp_path / "two", small_folder, pairs=others)
    bare = answers(TransformersModel(str(small_folder)))
    llm = load_adapter(TransformersModel(str(small_folder)), one)
    llm.model.load_adapter(two, adapter_name="two")
    assert answers(llm) == [p.target for p in PAIRS]
    llm.model.set_adapter("two")
    assert answers(llm) == ["no"] * len(PAIRS)
    with llm.model.disable_adapter():
        assert answers(llm) == bare
    llm.model.set_adapter("default")
    assert answers(llm) == [p.target for p in PAIRS]


def test_update_norms_start_at_zero_and_grow(small_folder):
    recipe = Recipe(rank=4, rate=1e-2, epochs=2, batch=4, warmup=1)
    llm = wrap(TransformersModel(str(small_folder)), recipe)
    assert (update_norms(llm.model)["update"] == 0).all()
    tune(llm, PAIRS, recipe)
    norms = update_norms(llm.model)
    assert len(norms) == 2 * 7 and (norms["update"] > 0).all()
    assert sorted(set(norms["layer"])) == [0, 1] and "self_attn.q_proj" in set(norms["module"])
    assert not norms.duplicated(["layer", "module"]).any()


def test_update_norms_name_every_matrix_of_course_lm_once():
    norms = update_norms(wrap(CourseLM(), Recipe(rank=2)).model)
    assert not norms.duplicated(["layer", "module"]).any()
    assert {"attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"} <= set(norms["module"])


def test_saving_is_whole_or_not_at_all(tmp_path, small_folder, monkeypatch):
    folder, llm, history = small_adapter(tmp_path / "a", small_folder)
    content = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fails(part, **kwargs):
        part.mkdir(parents=True)
        (part / "adapter_config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(llm.model, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        keep(llm, folder, history)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == content
    monkeypatch.undo()
    save_adapter(llm, folder)  # what the failed attempt left behind is in nobody's way
    assert (folder / "adapter_model.safetensors").read_bytes() == content["adapter_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_adapter_that_is_not_there_is_named_with_a_remedy(tmp_path, small_folder):
    with pytest.raises(FileNotFoundError, match="COURSE_MODE=tiny"):
        load_adapter(TransformersModel(str(small_folder)), tmp_path / "nowhere")


def test_the_place_of_an_adapter_depends_on_pairs_recipe_and_seed(work):
    place = adapter_path("april", PAIRS, APRIL)
    assert place.parent == work / "adapters" and place.name.startswith("april-0-")
    assert place == adapter_path("april", list(PAIRS), APRIL)
    others = [adapter_path("april", PAIRS[:3], APRIL), adapter_path("april", PAIRS, RAFT),
              adapter_path("april", PAIRS, replace(APRIL, seed=1)), adapter_path("april", [*PAIRS[:3], replace(PAIRS[3], answer="2 m")], APRIL)]
    assert len({place, *others}) == 5


def test_tuned_trains_once_and_then_takes_what_it_kept(work, small_folder, monkeypatch):
    monkeypatch.setattr(module, "load_llm", lambda: TransformersModel(str(small_folder)))
    monkeypatch.setattr(module, "settings", SimpleNamespace(mode="tiny", llm="small"))
    recipe = Recipe(rank=4, rate=1e-2, epochs=30, batch=2, warmup=5)
    llm, info = tuned("small", PAIRS, recipe)
    assert info["steps"] == 60 and info["tokens"] > 0
    monkeypatch.setattr(module, "tune", lambda *a, **k: pytest.fail("it trained again"))
    again, same = tuned("small", PAIRS, recipe)
    assert same == info and answers(again) == answers(llm)


def test_replay_takes_the_committed_adapter_or_says_how_to_get_one(work, small_folder, monkeypatch):
    monkeypatch.setattr(module, "load_llm", lambda: TransformersModel(str(small_folder)))
    monkeypatch.setattr(module, "settings", SimpleNamespace(mode="replay", llm="small"))
    monkeypatch.setattr(module, "tune", lambda *a, **k: pytest.fail("replay trained"))
    with pytest.raises(FileNotFoundError, match="COURSE_MODE=tiny"):
        tuned("april", PAIRS, APRIL)


def test_replay_with_a_committed_adapter(work, small_folder, monkeypatch):
    monkeypatch.setattr(module, "load_llm", lambda: TransformersModel(str(small_folder)))
    small_adapter(work / "committed" / "april-0", small_folder)
    monkeypatch.setattr(module, "settings", SimpleNamespace(mode="replay", llm="small"))
    llm, info = tuned("april", PAIRS, APRIL)
    assert info["steps"] == 60 and answers(llm) == [p.target for p in PAIRS]
