"""utils.embedding, utils.retrieval and the retrieval half of utils.evaluation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.schema import NodeWithScore, TextNode

from utils import embedding as embedding_module
from utils.embedding import CourseEmbedding, EmbedderMissing, embedder_folder
from utils.evaluation import (Fact, Question, bootstrap, compare, load_facts, load_questions, read_jsonl, relevant_chunks,
                              retrieval_scores, squeeze)
from utils.retrieval import HybridRetriever, KeywordRetriever, brute_force, build_index, dense_retriever, fuse, plain_fusion_retriever, rank_all

TEXTS = ["Staff have 26 days of paid annual leave.", "The robot Curlew lifts 900 kg.", "Fault TM-407 means the tilt switch.",
         "The canteen serves soup on Mondays.", "Passwords are changed after a breach."]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    embedding_module.WORK = tmp_path_factory.mktemp("work")
    return CourseEmbedding(progress=False)


@pytest.fixture(scope="module")
def nodes():
    return [TextNode(text=t, id_=f"n{i}", metadata={"id": f"d{i}"}, excluded_embed_metadata_keys=["id"]) for i, t in enumerate(TEXTS)]


# -- embedding ----------------------------------------------------------------------------------------------------------
def test_vectors_have_unit_length_and_keep_the_order(embedder):
    vectors = embedder.encode(TEXTS)
    assert vectors.shape == (5, 384) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert np.allclose(embedder.encode(TEXTS[::-1])[::-1], vectors)


def test_the_cache_gives_back_the_same_vectors_without_the_model(embedder, monkeypatch):
    first = embedder.encode(TEXTS)
    monkeypatch.setattr(type(embedder), "_encode_now", lambda *a: pytest.fail("the model ran although all texts are cached"))
    assert np.array_equal(embedder.encode(TEXTS), first)


def test_the_cache_keeps_models_and_precisions_apart(embedder):
    other = CourseEmbedding(precision="float32", progress=False)
    exact, quick = other.encode(TEXTS), embedder.encode(TEXTS)
    assert np.abs(exact - quick).max() < 0.02
    if embedder.precision == "bfloat16":
        assert not np.array_equal(exact, quick)


def test_meaning_beats_words(embedder):
    question, leave, robot = embedder.encode(["how much time off do I get", TEXTS[0], TEXTS[1]])
    assert question @ leave > question @ robot


def test_an_empty_list_is_no_error(embedder):
    assert embedder.encode([]).shape == (0, 384)
    assert embedder._encode_now([], "none").shape == (0, 384)
    with pytest.raises(TypeError, match="list of texts"):
        embedder.encode("one text")


def test_a_damaged_embedder_is_refused(monkeypatch):
    monkeypatch.setattr(embedding_module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(EmbedderMissing, match="force-reinstall"):
        embedder_folder("minilm")


def test_an_unknown_embedder_names_what_is_expected():
    with pytest.raises(EmbedderMissing, match="sentence-transformers"):
        embedder_folder("/no/such/folder")
    with pytest.raises(ValueError, match="precision"):
        CourseEmbedding(precision="int3")


def test_bfloat16_is_taken_only_where_rankings_agree(monkeypatch):
    monkeypatch.setattr(embedding_module, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(CourseEmbedding, "_rankings_agree", lambda self, folder: False)
    assert CourseEmbedding(cache=False, progress=False).precision == "float32"


# -- retrieval ----------------------------------------------------------------------------------------------------------
def test_keyword_finds_codes_and_never_returns_what_shares_no_word(nodes):
    retriever = KeywordRetriever(nodes)
    hits = retriever.retrieve("what is fault TM-407")
    assert hits[0].node.node_id == "n2" and len(hits) < 5
    assert retriever.retrieve("zzz") == [] and retriever.retrieve("the of and") == []
    with pytest.raises(ValueError, match="at least one"):
        KeywordRetriever([])


def test_dense_and_hybrid(nodes, embedder):
    dense = dense_retriever(build_index(nodes, embedder), top_k=3)
    assert dense.retrieve("how much holiday do people get")[0].node.node_id == "n0"
    hybrid = HybridRetriever(KeywordRetriever(nodes), dense, top_k=3)
    assert hybrid.retrieve("holiday TM-407")[0].node.node_id in {"n0", "n2"}
    ranked = rank_all(hybrid, ["soup", "password"], embedder)
    assert [r[0].node.node_id for r in ranked] == ["n3", "n4"]


def test_dense_equals_brute_force(nodes, embedder):
    questions = ["how heavy a load", "what to eat", "time off"]
    dense = dense_retriever(build_index(nodes, embedder), top_k=5)
    wanted = brute_force(embedder.encode(questions), embedder.encode(TEXTS), 5)
    for row, ranking in zip(wanted, rank_all(dense, questions, embedder)):
        assert [h.node.node_id for h in ranking] == [f"n{i}" for i in row]


def test_fusion_by_hand():
    a, b, c = (NodeWithScore(node=_node(n, n), score=1.0) for n in "abc")
    merged = fuse([a, b], [b, c], top_k=3, weight=0.25, constant=1.0)
    assert [h.node.node_id for h in merged] == ["b", "c", "a"]
    assert [h.score for h in merged] == pytest.approx([0.75 / 2 + 0.25 / 3, 0.75 / 3, 0.25 / 2])
    with pytest.raises(ValueError, match="weight is 2"):
        HybridRetriever(None, None, weight=2)


def test_equal_weights_and_sixty_are_llamaindexs_fusion(nodes, embedder):
    keyword, dense = KeywordRetriever(nodes), dense_retriever(build_index(nodes, embedder), top_k=5)
    ours = HybridRetriever(keyword, dense, top_k=3, weight=0.5, constant=60).retrieve("leave TM-407 soup")
    theirs = plain_fusion_retriever(keyword, dense, top_k=3).retrieve("leave TM-407 soup")
    assert {h.node.node_id for h in ours} == {h.node.node_id for h in theirs}


def test_fusion_calls_no_llm_and_needs_no_network(nodes, embedder, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was touched"))
    plain_fusion_retriever(KeywordRetriever(nodes), dense_retriever(build_index(nodes, embedder))).retrieve("soup")


# -- evaluation ---------------------------------------------------------------------------------------------------------
def _fact(name, document, value, evidence):
    return Fact(name, "e", "a", value, document, evidence, (), True, False, None, "everyone")


def _question(i, fact, few=False):
    return Question(f"{fact}-{i}", fact, 4, "held_out", "?", "lookup", 0.5, few)


def _node(name, text, document="d"):
    return TextNode(text=text, id_=name, metadata={"id": document})


def test_relevant_chunks_hold_the_whole_evidence_or_the_value_with_most_of_it():
    chunks = [_node("a", "| Leave | 26 days |"), _node("b", "26 days, but of what?"), _node("c", "Leave  26\ndays", "other")]
    found = relevant_chunks({"f": _fact("f", "d", "26 days", "Leave 26 days"), "g": _fact("g", "d", "26 days", "what days 26 days")}, chunks)
    assert found["f"] == {"a"} and found["g"] == {"b"}
    assert squeeze("A–b, 1.5") == "ab15"


def test_scores_by_hand():
    nodes = {name: _node(name, name) for name in "abcdefghijk"}
    ranking = [NodeWithScore(node=nodes[n], score=1.0) for n in "abcdefghij"]
    questions = [_question(1, "f"), _question(1, "g"), _question(1, "h")]
    scores = retrieval_scores([ranking] * 3, questions, {"f": {"a"}, "g": {"d", "e"}, "h": {"k"}})
    assert scores["recall@1"].tolist() == [1, 0, 0] and scores["recall@3"].tolist() == [1, 0, 0]
    assert scores["recall@5"].tolist() == [1, 1, 0] and scores["MRR@10"].tolist() == [1, 0.25, 0]
    assert scores["nDCG@10"].tolist() == pytest.approx([1, 1 / np.log2(5), 0])


def test_a_ranking_without_hits_scores_zero():
    assert retrieval_scores([[]], [_question(1, "f")], {"f": {"a"}})["recall@10"].tolist() == [0]


def test_the_bootstrap_redraws_facts_not_questions():
    values, facts = [1, 1, 1, 0, 0, 0], ["f", "f", "f", "g", "g", "g"]
    by_fact, by_question = bootstrap(values, facts), bootstrap(values, range(6))
    assert by_fact.mean == by_question.mean == 0.5
    assert by_fact.high - by_fact.low > by_question.high - by_question.low
    with pytest.raises(ValueError, match="no values"):
        bootstrap([], [])


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_intervals_hold_the_mean_of_constant_data_and_stay_in_range(rows):
    interval = bootstrap([v for v, _ in rows], [f for _, f in rows], resamples=200)
    assert 0 <= interval.low <= interval.high <= 1
    difference, verdict = compare([v for v, _ in rows], [v for v, _ in rows], [f for _, f in rows], resamples=50)
    assert difference.mean == 0 and verdict == "cannot tell"


def test_compare_sees_a_clear_winner():
    assert compare([1] * 40, [0] * 40, range(40))[1] == "first"
    assert compare([0] * 40, [1] * 40, range(40))[1] == "second"


def test_the_ledger_loads_and_bad_names_are_errors(tmp_path):
    assert len(load_facts("2026-04-01")) > 500 and len(load_questions("held_out", "2026-10-01")) > 1500
    with pytest.raises(ValueError, match="snapshot '1999'"):
        load_facts("1999")
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        load_questions("test", "2026-04-01")
    with pytest.raises(FileNotFoundError, match="git checkout"):
        read_jsonl(tmp_path / "no.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n{\n")
    with pytest.raises(ValueError, match="bad.jsonl:2"):
        read_jsonl(tmp_path / "bad.jsonl")
