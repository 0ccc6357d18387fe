import copy
import gc

import pytest
import torch
from torch import nn

from holdfast import meter
from holdfast.budget import Budget
from holdfast.checks import tinylm
from holdfast.checks.training.recipes import (
    WITHIN,
    Chain,
    measured,
    segment_bytes,
    triangle,
    triangle_bytes,
)
from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.skeletons import Request
from holdfast.training import recipes
from holdfast.training.chunked import checkpoint_segments, chunked
from holdfast.training.models.evoformer import Evoformer, TriangleAttention, chunk_
from holdfast.training.saved import saved_bytes

BUDGET = Budget.parse("1GiB")
# Every recipe of both models is measured by `holdfast check recipes`; here some of each kind.
CASES = [
    ("tinylm", "recompute sqrt(L) segments"),
    ("tinylm", "saved tensors on disk"),
    ("evoformer", "recompute each block"),
    ("evoformer", "recompute sqrt(L) segments"),
    ("evoformer", "triangle attention by 16 rows"),
]
MODELS = {
    "tinylm": (lambda: tinylm.model(num_hidden_layers=4), 48),
    "evoformer": (lambda: _evoformer(depth=4), 20),
}


def _evoformer(**sizes) -> Evoformer:
    torch.manual_seed(0)
    common = {"c_m": 16, "c_z": 8, "heads": 2, "pair_heads": 2, "head_size": 4, "sequences": 4}
    return Evoformer(**(common | sizes))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """A meter collects garbage first; searching through what was imported before is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def predictors():
    return {
        name: recipes.Predictor(
            Request(build(), BUDGET, sequence=sequence, hardware="cpu-2core", reserve=0)
        )
        for name, (build, sequence) in MODELS.items()
    }


def _recipe(predictor, label):
    return next(r for r in predictor.recipes() if r.label == label)


@pytest.mark.parametrize(("name", "label"), CASES)
def test_prediction_equals_measurement(predictors, name, label):
    build, _ = MODELS[name]
    row = predictors[name].row(_recipe(predictors[name], label))
    held = measured(row, build)
    # A language model's masks and positions, and what an offload's copies overlap, differ a little.
    assert row.peak == pytest.approx(held.peak, rel=WITHIN if name == "tinylm" else 0)
    for category in ("parameters", "gradients", "optimizer"):
        assert row.cells[category] == held.at_peak[category]
    assert (row.needs.disk > 0) == (label == "saved tensors on disk")


def _gradients(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    loss_of(model(**inputs)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("change", [lambda m: chunk_(m, 5), lambda m: checkpoint_segments(m, 2)])
def test_chunks_and_segments_change_no_value(change):
    plain = _evoformer(depth=4)
    other = copy.deepcopy(plain)
    change(other)
    inputs = plain.example_inputs(2, 12)
    torch.testing.assert_close(other(**inputs), plain(**inputs), atol=1e-5, rtol=0)
    pairs = zip(_gradients(other, inputs), _gradients(plain, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 9])
def test_chunked_is_exact_for_every_argument(size, recompute):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    def fn(x, w):
        return (x @ w).softmax(-1) @ x.mT

    def both(f):
        return f(x.transpose(0, 1), w), torch.autograd.grad(
            f(x.transpose(0, 1), w).square().sum(), [x, w]
        )

    value, gradients = both(chunked(fn, 0, size, recompute=recompute))
    expected, wanted = both(fn)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, wanted)


def test_chunked_names_what_is_wrong():
    with pytest.raises(UsageError, match="chunk size 0 is not a positive"):
        chunked(torch.relu, 0, 0)
    with pytest.raises(UsageError, match="slice of 2 rows along dim 0 gave 1"):
        chunked(lambda x: x.sum(0, keepdim=True), 0, 2)(torch.ones(4, 3))


def test_sqrt_segments_hold_least():
    held = {k: segment_bytes(k) for k in (1, 2, 4, 8, 16)}
    assert min(held, key=held.__getitem__) == 4
    assert held[4] < 0.75 * min(held[1], held[16], segment_bytes(None))
    boundary = 256 * 16 * 4
    # k boundaries and the inside of one segment, whose first input is a boundary already.
    model, x = Chain(16), torch.randn(256, 16)
    checkpoint_segments(model, 4)
    assert saved_bytes(lambda: model(x), model, [x]) == 3 * boundary


def test_segments_undo_themselves_and_name_errors():
    model = Chain(6)
    names = list(model.state_dict())
    handle = checkpoint_segments(model, 4)
    assert [len(s.blocks) for s in model.blocks] == [2, 2, 1, 1]
    handle.remove()
    assert list(model.state_dict()) == names
    with pytest.raises(UsageError, match="blocks has 6 blocks, which cannot make 7 segments"):
        checkpoint_segments(model, 7)
    with pytest.raises(UsageError, match="no list of repeated blocks"):
        checkpoint_segments(nn.Linear(2, 2))


@pytest.mark.parametrize(("chunk", "low", "high"), [(None, 7, 8), (8, 3.8, 4.2)])
def test_growth_with_residues(chunk, low, high):
    small, large = (triangle_bytes(residues, chunk) for residues in (64, 128))
    assert low <= large / small <= high


def test_triangle_bytes_are_those_of_a_real_step():
    module, (pair,) = triangle(20, 8)
    module(pair).sum().backward()
    with meter.Meter(module, inputs=pair) as held:
        module(pair).sum().backward()
    assert triangle_bytes(20, 8) == held.peak - held.base


def test_ending_node_by_hand():
    """Algorithm 14 written out for one edge."""
    module = TriangleAttention(3, 1, 2, starting=False)
    pair = torch.randn(1, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    z = module.norm(pair)[0]
    attention = module.attention
    q, k, v = attention.qkv(z).chunk(3, -1)
    bias = module.bias(z)[..., 0]
    i, j = 1, 2
    logits = torch.stack([q[i, j] @ k[n, j] / 2**0.5 + bias[n, i] for n in range(4)])
    mixed = sum(w * v[n, j] for n, w in enumerate(logits.softmax(0)))
    expected = attention.out(attention.gate(z[i, j]).sigmoid() * mixed)
    torch.testing.assert_close(module(pair)[0, i, j], expected)


def test_impossible_budget_names_the_smallest(predictors):
    predictor = predictors["evoformer"]
    labels = (recipes.PLAIN, "recompute each block", "gradients in backward")
    rows = [predictor.row(_recipe(predictor, label)) for label in labels]

    def table_of(device: int) -> recipes.Table:
        request = Request(None, Budget(device), hardware="cpu-2core", reserve=0)
        return recipes.Table(request, rows, {})

    smallest = table_of(1).smallest.needs.device
    assert smallest == min(row.peak for row in rows)
    assert table_of(smallest).fits and not table_of(smallest - 1).fits
    error = table_of(1).does_not_fit()
    assert isinstance(error, DoesNotFit) and error.exit_code == 3
    assert f"--budget {smallest}" in str(error) and "recompute each block" in str(error)
    assert error.details["smallest_budget"] == smallest


def test_recipes_say_why_they_do_not_apply():
    model = resolve(_evoformer(depth=2)).build()
    reasons = {r.label: r.why_not for r in recipes.recipes(model, 1, on_gpu=False)}
    assert reasons["micro-batches of 1"] == "the batch is one sequence"
    assert "causal language models" in reasons["chunked loss"]
    assert "2 blocks" in reasons["recompute sqrt(L) segments"]
    assert reasons[recipes.PLAIN] is None
