"""The committed experiments: made from the committed data and recipes, complete, and small enough for a repository."""

import json

import pandas as pd
import pytest

from data.build.experiments import FOLDER, SEEDS, fingerprint, table
from utils import report
from utils.evaluation import load_items
from utils.finetuning import ADAPTERS, load_adapter
from utils.llm import load_llm

measured = pytest.mark.skipif(not FOLDER.exists(), reason="the experiments are not measured yet: python -m data.build.experiments")
TABLES = ("ablations", "answers", "costs", "triage")


@measured
@pytest.mark.parametrize("name", TABLES)
def test_a_table_was_made_from_the_committed_data_weights_and_recipes(name):
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert content["made_from"] == fingerprint(), f"{name} is not current; run: python course.py results"
    frame = report.experiment(name)
    assert len(frame) == len(content["rows"]) > 0 and frame.attrs["banner"].startswith("mode ")


@measured
def test_every_arm_answered_every_item_with_every_seed():
    frame = report.experiment("answers")
    items = {item.id for item in load_items()}
    assert len(items) >= 400
    for arm, own in frame.groupby("arm"):
        seeds = set(SEEDS) if arm in ("fine-tuned", "both", "RAFT") else {0}
        assert set(own.seed) == seeds
        for _, one in own.groupby("seed"):
            assert set(one.id) == items and one.id.is_unique


@measured
def test_the_triage_table_is_that_of_the_answers():
    given = report.experiment("answers")
    for row in report.experiment("triage").itertuples():
        arm = "RAG" if row.arm == "few-shot RAG" else row.arm
        own = given[(given.arm == arm) & (given.seed == row.seed) & (given.kind == "triage")]
        assert row.correct == pytest.approx(own.correct.mean()) and row.low <= row.correct <= row.high


@measured
@pytest.mark.parametrize("name", [f"{kind}-{seed}" for kind in ("april", "raft") for seed in SEEDS])
def test_adapters_are_small_safetensors_with_their_training(name):
    folder = ADAPTERS / name
    files = {f.name: f.stat().st_size for f in folder.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert files["adapter_model.safetensors"] <= 5_000_000
    assert "/" not in json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert json.loads((folder / "training.json").read_text(encoding="utf-8"))["steps"] > 0


@measured
def test_a_committed_adapter_gives_the_committed_answers():
    frame = report.experiment("answers")
    own = frame[(frame.arm == "fine-tuned") & (frame.seed == 0) & (frame.kind == "triage")].head(24)
    texts = {item.id: item.text for item in load_items()}
    llm = load_adapter(load_llm(), ADAPTERS / "april-0")
    said = [g.text for g in llm.generate([llm.prompt(texts[i]) for i in own.id])]
    same = sum(a == b for a, b in zip(said, own.answer))
    assert same >= 21  # bfloat16 rounds differently on other processors, and the committed answers are the merged model's


def test_a_table_is_kept_until_what_it_was_made_from_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("data.build.experiments.FOLDER", tmp_path)
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"arm": ["a", "b"], "value": [1.5, float("nan")]})

    table("x", (0,), make)
    again = table("x", (0,), make)
    assert len(made) == 1 and again["arm"].tolist() == ["a", "b"] and pd.isna(again["value"][1])
    monkeypatch.setattr("data.build.experiments.METHOD", 99)
    table("x", (0,), make)
    assert len(made) == 2
    table("x", (0, 1), make)
    assert len(made) == 3 and not list(tmp_path.glob("*.part"))
