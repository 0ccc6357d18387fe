import json

import pytest

from holdfast.budget import Budget
from holdfast.errors import UsageError
from holdfast.plan import devices
from holdfast.plan.devices import DeviceFitter
from holdfast.plan.file import Parallel, PlanFile
from holdfast.plan.plan import Plan
from holdfast.plan.skeletons import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 32,
            }
        )
    )
    return str(path)


def _fitter(model: str, budget: str, ranks: int = 2, **options) -> DeviceFitter:
    options = {"task": "pretrain", "batch": 4, "sequence": 32, "hardware": "cpu-2core"} | options
    return DeviceFitter(Request(model, Budget.parse(budget), **options), ranks)


@pytest.fixture(scope="module")
def roomy(model) -> DeviceFitter:
    fitter = _fitter(model, "1GiB")
    fitter.best = fitter.search()
    return fitter


def test_with_room_the_fastest_way_is_taken(roomy, tmp_path):
    best = roomy.best
    assert best.seconds == min(s.seconds for s in roomy.candidates())
    plan = devices.to_plan(roomy, best)
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again.spec == plan.spec
    assert again.predicted.peak("device", rank=1) > 0
    document = devices.document(best, plan, roomy)
    assert [r["rank"] for r in document["predicted"]["ranks"]] == [0, 1]
    assert document["predicted"]["peak_bytes"] == best.peak


def test_less_room_takes_a_slower_way_that_fits(roomy, model):
    budget = roomy.best.peak + roomy.fitter.reserve - 1
    tight = _fitter(model, f"{budget}B")
    best = tight.search()
    assert best.peak + tight.fitter.reserve <= budget
    assert best.seconds >= roomy.best.seconds
    # What is skipped without a rehearsal could not have fitted.
    assert all(s.least <= s.peak for s in tight.tried if s.ledger)


def test_where_nothing_fits_the_smallest_budget_is_said_and_fits(model):
    # One micro-batch at a time and few ways, to keep it short.
    small = _fitter(model, "190KiB", batch=2)
    assert small.search() is None
    error = devices.does_not_fit(small)
    assert error.exit_code == 3
    needed = error.details.get("smallest_budget")
    if needed is None:
        assert "more devices" in str(error)
    else:
        assert _fitter(model, f"{needed}B", batch=2).search() is not None


def test_earlier_ranks_of_a_pipeline_recompute_first(roomy):
    blocks = {
        shared.spec.methods.blocks["model.layers"]
        for shared in roomy.candidates()
        if shared.spec.parallel.pipeline == 2 and shared.spec.parallel.chunks == 1
    }
    assert blocks == {"keep*2", "recompute*1 keep*1", "recompute*2"}


def test_candidates_use_every_rank_once(roomy):
    for shared in roomy.candidates():
        assert shared.spec.parallel.ranks == 2
        assert shared.spec.batch == 4
        assert shared.spec.accumulation * shared.spec.micro_batch * shared.spec.replicas == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ("adamw4",)}, "leave out --methods"),
        ({"tune": "adapter", "task": "finetune"}, "whole models"),
        ({"optimizer": "sgd"}, "leave out --optimizer"),
    ],
)
def test_what_several_devices_cannot_do_is_refused(model, change, says):
    with pytest.raises(UsageError, match=says):
        _fitter(model, "1GiB", **change)


def test_one_device_and_other_heads_are_refused(model):
    with pytest.raises(UsageError, match="without --devices"):
        _fitter(model, "1GiB", ranks=1)
    with pytest.raises(UsageError, match="causal language models"):
        _fitter("bert-base", "64GiB", sequence=32)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "one rank is not parallel"),
        ({"data": 2, "chunks": 2}, "belong to a pipeline"),
        ({"pipeline": 2, "zero": 1}, "replicas are whole"),
        ({"pipeline": 2}, "costs has 0 entries for 2 parts"),
    ],
)
def test_wrong_sections_of_a_plan_name_the_field(section, says):
    with pytest.raises(ValueError, match=says):
        Parallel(**section)


def test_a_batch_must_suit_the_replicas():
    parallel = Parallel(data=2)
    with pytest.raises(ValueError, match="on each of 2 replicas does not divide batch 3"):
        PlanFile(model="m", batch=3, sequence=8, budget={"device": 2**20}, parallel=parallel)
