"""Every method of the registry: a step after a checkpoint is the step that would have come."""

import json
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.plan import apply
from holdfast.plan.file import Methods, PlanFile
from holdfast.plan.plan import Plan
from holdfast.plan.registry import methods
from holdfast.training import checkpoint

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_dropout=0.1,
)
STEPS, SAVED = 5, 3
DATA = torch.randint(64, (STEPS, 2, 32), generator=torch.Generator().manual_seed(0))


# What is due every so many steps comes due within these, and no rank exceeds the model's width.
KNOBS = {
    "qgalore": {"rank": 8, "gap": 2},
    "osd": {"rank": 8},
    "compact": {"gap": 2},
    "sst": {"interval": 2},
    "ist": {"keep": 0.5},
}


def chosen(key: str) -> Methods:
    """The method with what it needs."""
    entries = {"optimizer": {"adamw": {}}, "saved": []}
    # A schedule draws among adapters, whichever they are.
    keys = [key, "lora"] if key == "ist" else [key]
    for each in keys:
        keys += [needed for needed in methods()[each].requires if needed not in keys]
        slot = methods()[each].slot
        choice = {each: KNOBS.get(each, {})}
        if slot == "saved":
            entries["saved"].append(choice)
        else:
            entries[slot] = choice
    return Methods(**entries)


def start(spec: Methods):
    torch.manual_seed(0)
    plan = Plan(PlanFile(model="mine", sequence=32, budget={"device": 2**40}, methods=spec))
    model, optimizer = plan.apply(LlamaForCausalLM(CONFIG))
    batches = [{"input_ids": ids, "labels": ids} for ids in DATA]
    apply.calibrate(model, batches, spec)
    torch.manual_seed(1)
    return model, optimizer


def advance(model, optimizer, first: int, last: int) -> list[float]:
    losses = []
    for ids in DATA[first:last]:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("key", sorted(methods()))
def test_resumed_steps_are_bitwise_those_of_one_run(key, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        spec = chosen(key)
        model, optimizer = start(spec)
        advance(model, optimizer, 0, SAVED)
        saved = checkpoint.save(tmp_path / "mid", SAVED, model, optimizer, {})
        expected = advance(model, optimizer, SAVED, STEPS)
        end = checkpoint.save(tmp_path / "one", STEPS, model, optimizer, {})
        other, resumed = start(spec)
        checkpoint.load(saved, other, resumed)
        assert advance(other, resumed, SAVED, STEPS) == expected
        again = checkpoint.save(tmp_path / "two", STEPS, other, resumed, {})
    for name in ("state.safetensors", "state.json"):
        assert (end / name).read_bytes() == (again / name).read_bytes(), name
    assert json.loads((end / "state.json").read_text())["step"] == STEPS
