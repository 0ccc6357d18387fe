"""What every optimizer of the catalogue must do; a new one is tested by existing."""

import copy
import io

import pytest
import torch
from torch import nn

from holdfast.plan.method import Method
from holdfast.plan.registry import of_slot


def _methods() -> list[Method]:
    # torch's own are its business.
    return [m for m in of_slot("optimizer") if m.key not in ("adamw", "sgd")]


METHODS = _methods()
each = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 80)).to(dtype)


def _train(model: nn.Module, optimizer, steps: int, seed: int = 0, scheduler=None) -> list[float]:
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(96, 80, generator=torch.Generator().manual_seed(9)) / 10
    dtype, losses = next(model.parameters()).dtype, []
    for _ in range(steps):
        x = torch.randn(32, 96, generator=g)
        loss = (model(x.to(dtype)).float() - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for part in tree for t in _tensors(part)] if isinstance(tree, list | tuple) else []


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def test_the_catalogue_has_optimizers():
    assert {"adamw4", "adamw8", "coat"} <= {m.key for m in METHODS}


@each
@each_dtype
def test_state_dict_round_trip_and_resume_are_bitwise(method, dtype):
    model = _model(dtype)
    optimizer = method.apply(list(model.named_parameters()), 1e-2)
    _train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)

    other = copy.deepcopy(model)
    resumed = method.apply(list(other.named_parameters()), 1e-2)
    resumed.load_state_dict(torch.load(file))
    before, after = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert _tensors(before) and _same(_tensors(before), _tensors(after))

    _train(model, optimizer, 3, seed=1)
    _train(other, resumed, 3, seed=1)
    assert _same(list(model.parameters()), list(other.parameters()))
    assert _same(_tensors(optimizer.state_dict()["state"]), _tensors(resumed.state_dict()["state"]))


@each
def test_a_loaded_state_shares_no_memory_with_the_file(method):
    model = _model()
    optimizer = method.apply(list(model.named_parameters()), 1e-2)
    _train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = [t.clone() for t in _tensors(saved["state"])]
    optimizer.load_state_dict(saved)
    _train(model, optimizer, 2)
    assert _same(kept, _tensors(saved["state"]))


@each
@each_dtype
def test_bytes_equal_the_formula(method, dtype):
    if method.state_bytes is None:
        assert method.requires  # its states follow from what its partner makes of the model
        return
    model = _model(dtype)
    optimizer = method.apply(list(model.named_parameters()), 1e-2)
    _train(model, optimizer, 2)
    measured = sum(t.untyped_storage().nbytes() for t in _tensors(optimizer.state_dict()["state"]))
    knobs = method.defaults()
    assert measured == sum(
        method.state_bytes(p.shape, p.dtype, **knobs) for p in model.parameters()
    )


@each
@each_dtype
def test_converges(method, dtype):
    model = _model(dtype)
    losses = _train(model, method.apply(list(model.named_parameters()), 1e-2), 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@each
def test_a_group_has_its_own_rate(method):
    model = _model()
    optimizer = method.apply(list(model.named_parameters()), 1e-2)
    frozen = model[2].weight
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not frozen]
    optimizer.add_param_group({"params": [frozen], "lr": 0.0})
    start, other = frozen.detach().clone(), model[0].weight.detach().clone()
    _train(model, optimizer, 2)
    assert torch.equal(frozen, start) and not torch.equal(model[0].weight, other)


@each
def test_follows_a_scheduler(method):
    model = _model()
    optimizer = method.apply(list(model.named_parameters()), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    _train(model, optimizer, 2, scheduler=scheduler)
    stopped = [p.detach().clone() for p in model.parameters()]
    _train(model, optimizer, 2, scheduler=scheduler)
    assert _same(stopped, [p.detach() for p in model.parameters()])


@each
def test_a_tensor_rate_equals_a_float_rate(method):
    models = [_model(), _model()]
    for model, lr in zip(models, (0.0078125, torch.tensor(0.0078125)), strict=True):
        _train(model, method.apply(list(model.named_parameters()), lr), 3)
    assert _same(*([p.detach() for p in m.parameters()] for m in models))


@each
def test_without_a_gradient_nothing_happens(method):
    model = _model()
    optimizer = method.apply(list(model.named_parameters()), 1e-2)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert _same(start, [p.detach() for p in model.parameters()])
    assert not optimizer.state_dict()["state"]


@each
def test_a_compiled_model_trains_like_the_same_one_in_eager_mode(method):
    results = []
    for compiled in (False, True):
        model = _model()
        optimizer = method.apply(list(model.named_parameters()), 1e-2)
        # Graphs are traced as for any backend, but run by torch's own operators: bitwise the same.
        run = torch.compile(model, backend="aot_eager") if compiled else model
        losses = _train(run, optimizer, 3)
        results.append([torch.tensor(losses), *(p.detach() for p in model.parameters())])
    assert _same(*results)
