import copy
import io

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.meter import Meter, predict
from holdfast.training.optim import projector
from holdfast.training.optim.osd import (
    OPTIMS,
    OnlineSubspace,
    OSDAdamW,
    pca_gradient,
    pca_gradient_ref,
    state_bytes,
)
from holdfast.training.optim.state_optimizer import StateOptimizer


def matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def subspace(shape, rank, optim="adamw", **options):
    layout = OnlineSubspace.layout(shape, rank, optim)
    state = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in layout.items()}
    return OnlineSubspace.of(state, shape, optim, **options)


@pytest.mark.parametrize("ortho", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(12, 7), (7, 7), (40, 33)])
def test_gradient_is_that_of_the_loss(shape, ortho):
    g, basis = matrix(*shape).double(), matrix(4, shape[1], 1).double()
    got, seen = pca_gradient(g, g @ basis.mT, basis, ortho)
    want, _ = pca_gradient_ref(g, g @ basis.mT, basis, ortho)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    single, _ = pca_gradient(g.float(), (g @ basis.mT).float(), basis.float(), ortho)
    assert (single - want).abs().max() <= 1e-6 * want.abs().max() + 1e-6
    assert seen == 1


def test_gradient_by_hand():
    # G sees one axis, P another at length 1: H = C = 0, so the gradient is 0; halfway it is not.
    g = torch.tensor([[2.0, 0.0]])
    across, halfway = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.0]])
    assert pca_gradient(g, g @ across.mT, across)[0].tolist() == [[0, 0]]
    # The loss is (p² - 1)², its slope 4p(p² - 1) = -1.5 at p = 1/2.
    assert pca_gradient(g, g @ halfway.mT, halfway)[0].tolist() == [[-1.5, 0.0]]


def test_nothing_of_the_size_of_a_projector_is_made():
    g = matrix(300, 200)
    space = subspace((300, 200), 4)
    space.start_(g)
    low = space.down(g)
    with Meter() as meter:
        space.follow_(g, low, 1)
    assert meter.peak < 4 * 200 * 200


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_steps_bring_the_basis_to_the_leading_subspace(optim, shape):
    u, _ = torch.linalg.qr(matrix(shape[0], 3))
    v, _ = torch.linalg.qr(matrix(shape[1], 3, 1))
    g = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ v.mT
    lr = {"adamw": 1e-2, "lion": 3e-3, "sgd": 0.2}[optim]
    space = subspace(shape, 3, optim, lr=lr)
    space.basis.copy_(matrix(3, 20, 2) / 5)
    for step in range(600):
        space.follow_(g, space.down(g), step + 1)
    torch.testing.assert_close(space.up(space.down(g)), g, atol=0.05, rtol=0)


def test_adamw_on_the_basis_is_torchs_adam():
    space, p = subspace((30, 20), 4, lr=0.01), matrix(4, 20, 5) / 4
    space.basis.copy_(p)
    p.requires_grad_()
    adam = torch.optim.Adam([p], lr=0.01)
    for step in range(5):
        g = matrix(30, 20, step)
        space.follow_(g, space.down(g), step + 1)
        p.grad = pca_gradient_ref(g, g @ p.detach().mT, p.detach())[0]
        adam.step()
    torch.testing.assert_close(space.basis, p.detach(), atol=1e-5, rtol=1e-4)


def test_ortho_keeps_rows_apart():
    lengths = []
    for ortho in (0.0, 1.0):
        space = subspace((20, 10), 4, "sgd", lr=0.02, ortho=ortho)
        space.basis.copy_(2 * torch.eye(4, 10))
        g = torch.zeros(20, 10)
        g[:, -1] = 1  # nothing of it is in the subspace
        for step in range(300):
            space.follow_(g, space.down(g), step + 1)
        lengths.append(space.basis.norm(dim=1))
    assert (lengths[0] == 2).all() and (lengths[1] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_gradient_without_direction_leaves_the_basis(optim, bad):
    space = subspace((30, 20), 4, optim)
    g = matrix(30, 20)
    space.start_(g)
    space.follow_(g, space.down(g), 1)  # moments are not zero
    before = [t.clone() for t in (space.basis, *space.moments.values())]
    g = torch.full((30, 20), bad)
    space.follow_(g, space.down(g), 2)
    after = (space.basis, *space.moments.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def osd_ref(weight, grads, lr, rank, rate, scale, decay, betas=(0.9, 0.999), eps=1e-8):
    """The steps by their definition, dense and in fp64, with plain SGD on the basis."""
    w = weight.double()
    right = w.shape[0] >= w.shape[1]
    basis = m = v = None
    for t, g in enumerate(grads, start=1):
        g = g.double()
        tall = g if right else g.mT
        if t == 1:
            basis = torch.linalg.svd(tall, full_matrices=False).Vh[:rank]
            m, v = (torch.zeros(len(tall), rank).double() for _ in "mv")
        h = tall @ basis.mT
        m, v = betas[0] * m + (1 - betas[0]) * h, betas[1] * v + (1 - betas[1]) * h * h
        u = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        step = lr * scale * u @ basis
        w = w * (1 - lr * decay) - (step if right else step.mT)
        basis = basis - rate * pca_gradient_ref(tall, h, basis)[0]
    return w.float()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_equals_the_dense_reference(shape):
    # Rows of well separated scales: the signs of singular vectors do not matter, their order does.
    scales = torch.logspace(0, -2, shape[1])
    grads = [matrix(*shape, seed=t) * scales for t in range(6)]
    p = nn.Parameter(matrix(*shape, seed=9))
    want = osd_ref(p.detach().clone(), grads, 0.1, 3, 0.05, 0.25, 0.1)
    optimizer = OSDAdamW([p], 0.1, rank=3, optim="sgd", subspace_lr=0.05, weight_decay=0.1)
    for g in grads:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), want, atol=1e-4, rtol=1e-3)


def test_only_the_first_step_decomposes(monkeypatch):
    calls = []
    original = projector.leading
    monkeypatch.setattr(projector, "leading", lambda g, r: calls.append(1) or original(g, r))
    p = nn.Parameter(matrix(40, 33))
    optimizer = OSDAdamW([p], rank=4)
    for t in range(5):
        p.grad = matrix(40, 33, t)
        optimizer.step()
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "bytes_"),
    [
        # basis 16x64 and two moments of it, two of 96x16, the step
        ((96, 64), 4 * (3 * 16 * 64 + 2 * 96 * 16) + 4),
        ((37, 101), 4 * (3 * 16 * 37 + 2 * 16 * 101) + 4),
        ((101,), 4 * 202 + 4),
        ((16, 300), 4 * 2 * 4800 + 4),
    ],
)
def test_state_bytes_are_the_formula(shape, bytes_, dtype):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = OSDAdamW([p], rank=16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p].values()
    assert sum(t.untyped_storage().nbytes() for t in state) == bytes_
    assert state_bytes(shape, dtype, rank=16) == bytes_
    assert all(t.dtype is torch.float32 for t in state)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(64, 96, dtype=dtype), nn.Tanh(), nn.Linear(96, 40, dtype=dtype)
    return nn.Sequential(*layers)


def train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        x = matrix(16, 64, seed=t).to(model[0].weight.dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :40]).square().mean().backward()
        optimizer.step()


def test_the_basis_follows_the_schedule():
    moves = []
    for factor in (1.0, 0.5, 0.0):
        p = nn.Parameter(matrix(40, 33))
        optimizer = OSDAdamW([p], 0.02, rank=4)
        p.grad = matrix(40, 33, 1)
        optimizer.step()
        before = optimizer.state[p]["basis"].clone()
        optimizer.param_groups[0]["lr"] = 0.02 * factor
        p.grad = matrix(40, 33, 2)
        optimizer.step()
        moves.append((optimizer.state[p]["basis"] - before).norm().item())
    assert moves[1] == pytest.approx(moves[0] / 2, rel=1e-4) and moves[2] == 0 < moves[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", OPTIMS)
def test_resume_is_bitwise(dtype, optim):
    model = net(dtype)
    optimizer = OSDAdamW(model.parameters(), rank=8, optim=optim, ortho=0.01)
    optimizer.param_groups[0]["lr"] /= 2  # a schedule has begun
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = OSDAdamW(other.parameters(), rank=8, optim=optim, ortho=0.01)
    resumed.load_state_dict(torch.load(file))
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 3, start=3)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_another_state_optimizer_can_use_it():
    """Three lines of plain SGD on an online subspace that Lion moves."""

    class OSDSGD(StateOptimizer):
        def layout(self, p, group):
            return OnlineSubspace.layout(tuple(p.shape), 8, "lion")

        def update(self, p, grad, state, group):
            space = OnlineSubspace.of(state, tuple(p.shape), "lion", lr=1e-3)
            if state["step"] == 1:
                space.start_(grad)
            low = space.down(grad)
            p.sub_(space.up(low), alpha=group["lr"])
            space.follow_(grad, low, int(state["step"]))

    model = nn.Linear(64, 48, bias=False)
    target = matrix(48, 4) @ matrix(4, 64, 1) / 8
    optimizer = OSDSGD(model.parameters(), {"lr": 0.5})
    losses = []
    for t in range(60):
        x = matrix(64, 64, t)
        loss = (model(x) - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_group_without_rank_is_plain_adamw():
    p, q = nn.Parameter(matrix(40, 33)), nn.Parameter(matrix(40, 33))
    r = nn.Parameter(matrix(40, 33))
    optimizer = OSDAdamW([{"params": [p]}, {"params": [q], "rank": None}], 0.01, rank=4)
    torchs = torch.optim.AdamW([r], 0.01, weight_decay=0)
    for t in range(4):
        for x in (p, q, r):
            x.grad = matrix(40, 33, t)
        optimizer.step()
        torchs.step()
    assert "basis" in optimizer.state[p] and "basis" not in optimizer.state[q]
    torch.testing.assert_close(q, r)


def test_prediction_covers_the_first_step():
    def build():
        model = net()
        return model, OSDAdamW(model.parameters(), rank=8), (torch.zeros(16, 64),)

    def step(model, optimizer, inputs):
        model(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    predicted = predict(build, step)
    model, optimizer, inputs = build()
    with Meter(model, optimizer, inputs=inputs) as first:
        step(model, optimizer, inputs)
    with Meter(model, optimizer, inputs=inputs) as later:
        step(model, optimizer, inputs)
    for category in ("parameters", "optimizer", "gradients"):
        assert predicted.at_peak[category] == later.at_peak[category], category
    assert first.peak <= predicted.peak and later.peak <= predicted.peak


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"subspace_lr": -1.0}, "subspace_lr=-1.0 must be >= 0"),
        ({"ortho": -1.0}, "ortho=-1.0 must be >= 0"),
        ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
        ({"optim": "adamv"}, "adamw"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(UsageError, match=message):
        OSDAdamW([nn.Parameter(torch.zeros(3))], **bad)
