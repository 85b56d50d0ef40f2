"""The answers, statistics and costs of utils.evaluation."""

import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.build.course_lm import evaluate
from utils.evaluation import (KINDS, Interval, Item, across_seeds, bootstrap, confusion, contains, exact_match, holm,
                              inference_flops, load_facts, load_items, load_questions, load_tickets, mcnemar, normalise,
                              percentile_ms, read_answer, score_answers, summarise, token_f1, training_flops,
                              triage_question, verdict)
from utils.llm import ABSTENTION

WORDS = st.lists(st.sampled_from("the 26 days, of Paid leave. a €5.20 curlew's".split()), max_size=8).map(" ".join)
ALL = dict.fromkeys(KINDS, 10**6)
patient = settings(deadline=None)  # a busy machine is no failure


# -- text ---------------------------------------------------------------------------------------------------------------
def test_normalisation_is_squads():
    assert normalise("The  Curlew's 1,500 kg, an A-frame!") == "curlews 1500 kg aframe"
    assert normalise("“26 days”") == "“26 days”" and normalise("A, an. the") == ""  # only ASCII punctuation goes


@patient
@given(st.text(max_size=40), st.text(max_size=40))
def test_text_metrics_are_those_of_course_lm(answer, truth):
    assert normalise(answer) == evaluate.normalise(answer) and normalise(normalise(answer)) == normalise(answer)
    assert exact_match(answer, truth) == evaluate.exact_match(answer, truth)
    assert token_f1(answer, truth) == evaluate.token_f1(answer, truth)


def test_text_metrics_by_hand():
    assert exact_match("26 Days.", "the 26 days") and not exact_match("26", "26 days")
    assert token_f1("26 days of leave", "26 days") == pytest.approx(2 * 2 / 6) and token_f1("", "") == 0
    assert contains("It is 26 days a year", "26 days") and contains("It is 26 days", "The 26 days.")
    assert not contains("It is 126 days", "26 days") and not contains("26 paid days", "26 days") and not contains("26", "a")


@patient
@given(WORDS, WORDS, WORDS)
def test_what_contains_a_truth_overlaps_with_it(before, truth, after):
    answer = f"{before} {truth} {after}"
    assert contains(answer, truth) == bool(normalise(truth))
    if contains(before, truth):
        assert token_f1(before, truth) > 0 and set(normalise(truth).split()) <= set(normalise(before).split())
    if exact_match(before, truth):
        assert token_f1(before, truth) == float(bool(normalise(truth)))


def test_citations_are_taken_out():
    assert read_answer("26 days [1][3]").citations == (1, 3) and read_answer("26 days [1][3]").text == "26 days"
    inline = read_answer(" Ask [2] the desk [12, 2]. ")
    assert (inline.text, inline.citations, inline.abstained) == ("Ask the desk.", (2, 12), False)
    assert read_answer("in [2024] or [x]").citations == () and read_answer("").text == ""


@pytest.mark.parametrize("text", [ABSTENTION, "i DON'T know", "I don’t know. [1]", "[2] I don't know [1].", " I don't know.\n"])
def test_abstentions(text):
    assert read_answer(text).abstained


@pytest.mark.parametrize("text", ["", "26 days", "I don't know the desk.", "I know."])
def test_no_abstentions(text):
    assert not read_answer(text).abstained


@patient
@given(WORDS.filter(bool), st.lists(st.integers(1, 99), max_size=4))
def test_reading_an_answer_undoes_writing_it(text, numbers):
    answer = read_answer(text + " " + "".join(f"[{n}]" for n in numbers))
    assert answer.text == text and answer.citations == tuple(dict.fromkeys(numbers))


# -- the test -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def items():
    return load_items()


@pytest.fixture(scope="module")
def everything():
    return load_items(ALL)


def of_kind(items, kind):
    return [item for item in items if item.kind == kind]


def test_the_test_is_large_sorted_and_the_same_every_time(items):
    assert len(items) >= 400 and len({item.id for item in items}) == len(items)
    assert Counter(item.kind for item in items) == {"lookup": 120, "few shared words": 100, "conflict": 60, "changed": 90,
                                                    "unanswerable": 100, "triage": 132}
    assert items == load_items() == sorted(items, key=lambda item: (KINDS.index(item.kind), item.id))
    assert items != load_items(seed=1)


def test_no_wording_of_the_test_is_trained_on(everything):
    trained = {q.text for q in load_questions("train", "2026-04-01")} | {q.text for q in load_questions("train", "2026-10-01")}
    trained |= {triage_question(t.text) for t in load_tickets("train")}
    assert not trained & {item.text for item in everything}
    held_out = {q.id: q for q in load_questions("held_out", "2026-10-01")}
    assert all(held_out[item.id].text == item.text for item in everything if item.kind in KINDS[:4])


def test_kinds_are_what_they_say(everything):
    april, october = load_facts("2026-04-01"), load_facts("2026-10-01")
    questions = {q.id: q for q in load_questions("held_out", "2026-10-01")}
    for item in everything:
        if item.kind in ("unanswerable", "triage"):
            assert item.cluster == item.id and not item.outdated and not item.document
            assert len(item.accepted) == (item.kind == "triage")
            continue
        fact, old = october[item.cluster], april[item.cluster]
        assert item.accepted[0] == fact.value and item.document == fact.document
        assert (item.kind == "changed") == fact.changed == (fact.value != old.value)
        assert (item.kind == "conflict") == (fact.superseded is not None)
        if item.kind == "changed":
            assert item.outdated[0] == old.value
            assert set(item.accepted[1:]) | set(item.outdated[1:]) == set(old.also)
        else:
            assert item.accepted == (fact.value, *fact.also)
            assert item.outdated == ((fact.superseded["value"],) if fact.superseded else ())
        if item.kind in ("lookup", "few shared words"):
            assert questions[item.id].few_shared == (item.kind == "few shared words")


def test_right_and_outdated_answers_can_be_told_apart(everything):
    for item in everything:
        assert all(normalise(v) for v in item.accepted + item.outdated), item
        for old in item.outdated:
            assert not any(contains(old, new) or contains(new, old) or exact_match(old, new) for new in item.accepted), item
        if item.kind in ("changed", "conflict"):
            scores = score_answers([item] * 2, [item.accepted[-1], item.outdated[-1]])
            assert scores["correct"].tolist() == [True, False] and scores["stale"].tolist() == [False, True], item


def test_other_forms_of_the_new_value_are_not_outdated(everything):
    people = next(item for item in of_kind(everything, "changed") if item.cluster == "co-003")
    assert people.accepted == ("68", "68 people") and people.outdated == ("62", "62 people")


def test_a_sample_takes_every_fact_before_any_fact_twice(items, everything):
    for kind in KINDS[:4]:
        some, available = of_kind(items, kind), {item.cluster for item in of_kind(everything, kind)}
        assert len({item.cluster for item in some}) == min(len(some), len(available)), kind
        assert set(some) <= set(of_kind(everything, kind))
    small, large = (set(load_items({"changed": n})) for n in (5, 70))
    assert small < large and max(Counter(item.cluster for item in large).values()) == 2


def test_triage_codes_are_balanced(items):
    codes = Counter(item.accepted for item in of_kind(items, "triage"))
    assert len(codes) == 12 and set(codes.values()) == {11}
    odd = Counter(item.accepted for item in load_items({"triage": 30}))
    assert sorted(odd.values()) == [2] * 6 + [3] * 6
    assert of_kind(items, "triage")[0].text.startswith("Which triage code does this ticket get? ")


def test_asked_keeps_the_facts_of_one_half():
    facts, halves = load_facts("2026-10-01"), [load_items(ALL, asked=asked) for asked in (True, False)]
    for asked, half in zip((True, False), halves):
        assert all(facts[item.cluster].asked is asked for item in half if item.kind in KINDS[:4])
        assert len(of_kind(half, "triage")) == 264 and len(of_kind(half, "unanswerable")) >= 150
    assert sum(len(of_kind(half, "changed")) for half in halves) == len(load_items({"changed": 10**6}))


def test_bad_kinds_and_splits_are_errors():
    assert load_items({}) == [] and len(load_items({"lookup": 3})) == 3
    with pytest.raises(ValueError, match="'riddle'.*lookup, few shared words, conflict"):
        load_items({"lookup": 1, "riddle": 2})
    with pytest.raises(ValueError, match="-1 of 'lookup'"):
        load_items({"lookup": -1})
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        load_tickets("test")
    assert (len(load_tickets("train")), len(load_tickets("held_out"))) == (600, 264)


def test_items_come_from_the_folder_given(tmp_path):
    versions = [{"snapshot": s, "document": "d", "value": v, "evidence": v} for s, v in (("2026-04-01", "1 kg"), ("2026-10-01", "2 kg"))]
    fact = {"id": "f", "entity": "e", "attribute": "a", "also": ["one kilo"], "access_group": "everyone", "versions": versions,
            "superseded": None, "asked": True, "changed": True}
    question = {"id": "f-4", "fact": "f", "wording": 4, "split": "held_out", "text": "How heavy?", "kind": "lookup", "shared": 0.1,
                "few_shared": True}
    for name, rows in {"facts": [fact], "questions": [question], "unanswerable": [], "tickets": []}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_items(folder=tmp_path) == [Item("f-4", "f", "changed", "How heavy?", ("2 kg",), ("1 kg", "one kilo"), "d")]


# -- scores -------------------------------------------------------------------------------------------------------------
LEAVE = Item("q1", "f", "changed", "How long?", ("26 days", "26"), ("24 days",), "leave")
RIDDLE = Item("q2", "q2", "unanswerable", "Why?", ())


def test_scores_by_hand():
    texts = ["26 days [1]", "It is 26 days. [1][2]", "24 days [2]", "30 days", ABSTENTION, "I don’t know [1]", "42 [1]"]
    scores = score_answers([LEAVE] * 5 + [RIDDLE] * 2, texts, [("leave", "old")] * 7)
    assert scores.index.tolist() == ["q1"] * 5 + ["q2"] * 2 and scores["cluster"].tolist() == ["f"] * 5 + ["q2"] * 2
    assert scores.columns.tolist() == ["cluster", "kind", "answer", "abstained", "exact", "f1", "correct", "stale", "wrong",
                                       "cites_right"]
    assert scores["answer"].tolist()[:3] == ["26 days", "It is 26 days.", "24 days"]
    assert scores["abstained"].tolist() == [False] * 4 + [True, True, False]
    assert scores["exact"].tolist() == [True, False, False, False, False, True, False]
    assert scores["f1"].tolist() == pytest.approx([1, 2 / 3, 0.5, 0.5, 0, 1, 0])
    assert scores["correct"].tolist() == [True, True, False, False, False, True, False]
    assert scores["stale"].tolist() == [False, False, True, False, False, False, False]
    assert scores["wrong"].tolist() == [False, False, True, True, False, False, True]
    assert scores["cites_right"].tolist() == pytest.approx([1, 0, 0, math.nan, math.nan, math.nan, math.nan], nan_ok=True)
    assert all(scores[c].dtype == bool for c in ("abstained", "exact", "correct", "stale", "wrong"))


def test_citations_out_of_range_are_wrong_and_without_documents_unknown():
    texts = ["26 days [3]", "26 days [0]", "26 days [1]"]
    scores = score_answers([LEAVE] * 3, texts, [("leave",), ("leave",), ()])
    assert scores["cites_right"].tolist() == [0, 0, 0]
    assert score_answers([LEAVE] * 3, texts)["cites_right"].isna().all()


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 items, 1 texts"):
        score_answers([LEAVE] * 2, ["26 days"])
    with pytest.raises(ValueError, match="cited_documents of 2"):
        score_answers([LEAVE], ["26 days"], [("a",), ("b",)])
    assert len(score_answers([], [])) == 0


ANSWERS = st.sampled_from(["26 days [1]", "about 26 days", "24 days", "no [2]", ABSTENTION, "", "26 or 24 days"])


@patient
@given(st.lists(st.tuples(st.sampled_from([LEAVE, RIDDLE]), ANSWERS), min_size=1, max_size=12))
def test_every_answer_is_right_wrong_or_an_abstention(pairs):
    scores = score_answers([item for item, _ in pairs], [text for _, text in pairs])
    answered = ~scores["abstained"]
    assert ((scores["correct"] & answered) ^ scores["wrong"] ^ scores["abstained"]).all()
    assert (scores["exact"] <= scores["correct"]).all() and scores["f1"].between(0, 1).all()
    assert (scores["stale"] <= scores["wrong"]).all()
    table = confusion(scores)
    assert table.to_numpy().sum() == len(pairs) and table.shape == (2, 3)
    assert table.loc["answerable"].sum() == sum(item is LEAVE for item, _ in pairs)


def test_confusion_by_hand():
    scores = score_answers([LEAVE] * 3 + [RIDDLE] * 2, ["26 days", "24 days", ABSTENTION, ABSTENTION, "42"])
    assert confusion(scores).to_dict("index") == {"answerable": {"answered right": 1, "answered wrong": 1, "abstained": 1},
                                                  "unanswerable": {"answered right": 0, "answered wrong": 1, "abstained": 1}}


def test_the_perfect_answers_are_right_everywhere(items):
    perfect = [item.accepted[0] if item.accepted else ABSTENTION for item in items]
    table = summarise(score_answers(items, perfect), resamples=50)
    assert table.index.tolist() == [*KINDS, "all"] and table["items"].tolist() == [120, 100, 60, 90, 100, 132, 602]
    assert all(str(interval) == "1.000 [1.000, 1.000]" for interval in table["correct"]) and table.loc["all", "f1"].mean == 1
    assert table.loc["unanswerable", "abstained"].mean == 1 and table.loc["lookup", "abstained"].mean == 0


def test_the_summary_redraws_facts():
    scores = score_answers([LEAVE] * 4 + [RIDDLE], ["26 days"] * 3 + ["no", "42"])
    scores["asked"] = [True, True, False, False, False]
    assert summarise(scores).loc["all", "correct"] == bootstrap(scores["correct"], scores["cluster"])
    assert summarise(scores, by="asked", resamples=20).loc[True, "correct"].mean == 1


# -- statistics ---------------------------------------------------------------------------------------------------------
def test_mcnemar_by_hand():
    five_nothing = mcnemar([1] * 5 + [1, 0], [0] * 5 + [1, 0])
    assert (five_nothing.first_only, five_nothing.second_only, five_nothing.p) == (5, 0, pytest.approx(2 / 32))
    assert mcnemar([True, False], [True, False]).p == 1 and mcnemar([], []).p == 1
    with pytest.raises(ValueError, match="2 and 1 values"):
        mcnemar([True, False], [True])
    with pytest.raises(ValueError, match="True or False"):
        mcnemar([0.5], [1])


@patient
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=16))
def test_mcnemar_is_the_binomial_and_symmetric(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    result, mirrored = mcnemar(first, second), mcnemar(second, first)
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert (result.first_only, result.second_only) == (b, c) == (mirrored.second_only, mirrored.first_only)
    assert result.p == pytest.approx(min(1, 2 * tail)) == pytest.approx(mirrored.p)


def test_holm_by_hand():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert list(holm({"z": 0.5, "a": 0.9})) == ["z", "a"] and holm({}) == {}
    with pytest.raises(ValueError, match="'b' is 1.5"):
        holm({"a": 0.5, "b": 1.5})
    with pytest.raises(ValueError, match="'a' is nan"):
        holm({"a": math.nan})


@patient
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_is_monotone_and_between_raw_and_bonferroni(raw):
    adjusted = holm(raw)
    assert list(adjusted) == list(raw)
    for name, p in raw.items():
        assert p <= adjusted[name] <= min(1, len(raw) * p)
        assert all(adjusted[name] <= adjusted[other] for other in raw if p <= raw[other])


def frame(values, clusters=None):
    return pd.DataFrame({"cluster": clusters or [f"f{i}" for i in range(len(values))], "correct": values})


def test_seeds_that_disagree_widen_the_interval():
    same = across_seeds([frame([1.0, 0.0] * 10)] * 3)
    apart = across_seeds([frame([1.0] * 20), frame([0.0] * 20), frame([1.0, 0.0] * 10)])
    assert same.mean == apart.mean == 0.5 and apart.high - apart.low > same.high - same.low
    uneven = [frame(np.linspace(0, 1, 20) ** 2)] * 3
    assert across_seeds(uneven) == across_seeds(uneven) != across_seeds(uneven, seed=1)


def test_one_seed_is_the_bootstrap_over_clusters():
    values = np.random.default_rng(0).integers(0, 2, 90).astype(float)
    clusters = [f"f{i // 3}" for i in range(90)]
    ours, plain = across_seeds([frame(values, clusters)], resamples=4000), bootstrap(values, clusters, resamples=4000)
    assert ours.mean == plain.mean and (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=0.02)


def test_seeds_need_the_same_items_and_some_values():
    with pytest.raises(ValueError, match="no values of 'correct'"):
        across_seeds([])
    with pytest.raises(ValueError, match="no values of 'correct'"):
        across_seeds([frame([math.nan])])
    with pytest.raises(ValueError, match="frame 2 holds other items"):
        across_seeds([frame([1.0]), frame([1.0], ["g"])])
    with pytest.raises(ValueError, match="frame 2 holds other items"):
        across_seeds([frame([1.0, 0.0]), frame([1.0, 0.0]).iloc[::-1]])
    assert across_seeds([frame([1.0, math.nan]), frame([1.0, 1.0])]).mean == 1


@patient
@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)))
def test_intervals_over_seeds_stay_in_range(rows):
    interval = across_seeds([frame(row) for row in rows], resamples=100)
    assert 0 <= interval.low <= interval.high <= 1 and interval.mean == pytest.approx(np.mean(rows))


def test_a_verdict_needs_the_interval_and_the_test():
    clear, unclear = Interval(0.2, 0.1, 0.3), Interval(0.2, -0.1, 0.5)
    assert verdict(clear, 0.01) == "first" and verdict(Interval(-0.2, -0.3, -0.1), 0.01) == "second"
    assert {verdict(clear, 0.05), verdict(unclear, 0.001), verdict(clear, math.nan), verdict(Interval(0.1, 0.0, 0.2), 0.01)} == {"cannot tell"}
    assert verdict(clear, 0.05, alpha=0.1) == "first"


# -- costs --------------------------------------------------------------------------------------------------------------
def test_costs():
    assert percentile_ms([0.001, 0.002, 0.003], 50) == pytest.approx(2) and percentile_ms(np.array([0.5]), 95) == 500
    with pytest.raises(ValueError, match="no durations"):
        percentile_ms([], 50)
    assert training_flops(10, 7, lora=False) == 420 and training_flops(10, 7, lora=True) == 280
    assert inference_flops(10, 7) == 140 and isinstance(inference_flops(10, 7), int)
