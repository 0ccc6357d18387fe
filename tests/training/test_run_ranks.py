import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from holdfast.errors import HoldfastError, UsageError
from holdfast.parallel.launch import launch
from holdfast.parallel.program import ledger_of, part_sizes
from holdfast.plan.file import Methods, Parallel, PlanFile
from holdfast.plan.plan import Plan
from holdfast.training import run_ranks
from holdfast.training.data import DataSource
from holdfast.training.run import Run, Settings

LAYERS, SEQUENCE, BATCH, STEPS = 4, 32, 8, 4
WAYS = {
    "replicas": {"data": 2},
    "zero 1": {"data": 2, "zero": 1},
    "zero 3": {"data": 2, "zero": 3},
    "pipeline": {"pipeline": 2, "chunks": 2, "order": "uniform", "offload": 1},
    # The first rank holds more micro-batches, so that its blocks are the ones to recompute.
    "pipelines": {"data": 2, "pipeline": 2, "order": "1f1b", "blocks": "recompute*2 keep*2"},
}


def _config(folder, tied: bool) -> str:
    path = folder / f"{'tied' if tied else 'untied'}.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 264,
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": SEQUENCE,
                "tie_word_embeddings": tied,
            }
        )
    )
    return str(path)


def _spec(model: str, way: dict, clip: float | None = 0.5) -> PlanFile:
    parallel = dict(way)
    runs = parallel.pop("blocks", None)
    parts = parallel.get("pipeline", 1) * parallel.get("chunks", 1)
    if parallel.get("pipeline", 1) > 1:
        parallel["costs"] = [(1, 1, 1, 0, 0, 0, 0)] * parts
    spec = PlanFile(
        model=model,
        task="pretrain",
        batch=BATCH,
        micro_batch=1,
        sequence=SEQUENCE,
        budget={"device": 2**26},
        methods=Methods(blocks={"model.layers": runs} if runs else {}),
        parallel=Parallel(**parallel),
        training={"learning_rate": 1e-2, "clip": clip},
    )
    if spec.parallel.pipeline > 1:
        costs = [(10**6,) * 3 + (a, 5 * 10**5, 5 * 10**5, b) for a, b in part_sizes(spec)]
        update = {"parallel": spec.parallel.model_copy(update={"costs": costs})}
        spec = spec.model_copy(update=update)
    cells = ledger_of(spec).to_json()
    return spec.model_copy(update={"predicted": {"ledger": cells}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    text = " ".join(f"the {i}th number is {i * i % 97}." for i in range(4000))
    (folder / "text.txt").write_text(text)
    return folder


def _settings(folder, **others) -> Settings:
    data = DataSource((str(folder / "text.txt"),))
    return Settings(data, tokenizer="bytes", steps=STEPS, **others)


@pytest.fixture(scope="module")
def plans(folder) -> dict[str, PlanFile]:
    # Tied embeddings lie at both ends of a pipeline.
    return {name: _spec(_config(folder, "pipe" in name), way) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def reports(folder, plans) -> dict[str, dict]:
    return {
        name: run_ranks.train_locally(Plan(spec), _settings(folder), folder / name)
        for name, spec in plans.items()
    }


@pytest.fixture(scope="module")
def alone(folder) -> dict[bool, dict]:
    """The same jobs on one device."""
    found = {}
    for tied in (False, True):
        spec = _spec(_config(folder, tied), {"data": 2})
        single = PlanFile(**(spec.model_dump() | {"parallel": None, "predicted": {}}))
        found[tied] = Run(Plan(single), _settings(folder), folder / f"alone {tied}").run()
    return found


@pytest.mark.parametrize("name", WAYS)
def test_every_rank_holds_what_its_rehearsal_predicted(reports, name):
    for rank in reports[name]["ranks"]:
        predicted, measured = rank["predicted"], rank["measured"]
        assert measured["by_category"] == predicted["by_category"]
        assert measured["peak_bytes"] == predicted["peak_bytes"] > 0


@pytest.mark.parametrize("name", WAYS)
def test_ranks_learn_what_one_process_learns(folder, reports, alone, name):
    tied = "pipe" in name
    for when in ("first", "last"):
        assert reports[name]["loss"][when] == pytest.approx(alone[tied]["loss"][when], rel=2e-4)
    ours = load_file(folder / name / "model.safetensors")
    theirs = load_file(folder / f"alone {tied}" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=2e-2, atol=2e-3)


def test_a_finished_run_only_reports(folder, plans, reports):
    again = run_ranks.train_locally(Plan(plans["zero 1"]), _settings(folder), folder / "zero 1")
    assert again == reports["zero 1"]


def _dying_rank(document, settings, out, overwrite):
    original = run_ranks.RankRun._step

    def step(self, metered):
        if self.rank == 1 and self.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, metered)

    run_ranks.RankRun._step = step
    return run_ranks.train_rank(document, settings, out, overwrite)


@pytest.mark.parametrize("name", ["zero 3", "pipeline"])
def test_a_rank_that_dies_ends_the_run_which_then_resumes_to_the_same_weights(
    folder, plans, reports, monkeypatch, name
):
    settings, out = _settings(folder, checkpoint_every=2), folder / f"{name} killed"
    whole = folder / f"{name} whole"
    run_ranks.train_locally(Plan(plans[name]), settings, whole)
    with monkeypatch.context() as patch:
        patch.setattr(run_ranks, "train_rank", _dying_rank)
        with pytest.raises(HoldfastError, match=r"of 2 failed.*go on from step 2") as failure:
            run_ranks.train_locally(Plan(plans[name]), settings, out, timeout=30)
    assert "\n" not in str(failure.value)
    run_ranks.train_locally(Plan(plans[name]), settings, out)
    one, two = (load_file(f / "model.safetensors") for f in (whole, out))
    assert all(torch.equal(one[key], two[key]) for key in one)
    lines = [(f / "log.jsonl").read_text().splitlines() for f in (whole, out)]
    assert [json.loads(x)["loss"] for x in lines[0]] == [json.loads(x)["loss"] for x in lines[1]]


def test_another_plan_does_not_continue_a_run(folder, plans, reports):
    with pytest.raises(UsageError, match="another plan"):
        run_ranks.train_locally(Plan(plans["zero 3"]), _settings(folder), folder / "zero 1")


def test_ranks_that_are_not_there_are_asked_for(plans):
    with pytest.raises(UsageError, match="use torchrun"):
        spec = plans["replicas"].model_copy(update={"parallel": Parallel(data=8), "batch": 8})
        run_ranks.train_locally(Plan(spec), None, None)


def _wrong_number(document) -> str:
    from holdfast.parallel.program import Layout

    try:
        Layout.of(PlanFile(**document).parallel)
    except UsageError as error:
        return str(error)
    return ""


def test_a_plan_for_other_ranks_is_refused(plans):
    said = launch(_wrong_number, 2, plans["pipelines"].model_dump(mode="json"))
    assert all("the plan is for 4 ranks" in text for text in said)
