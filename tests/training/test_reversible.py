import copy
import gc
import random

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter, predict
from holdfast.training.reversible import PROBES, MultiSplit, ReversibleSequence
from holdfast.training.saved import saved_bytes

WIDTH = 24


class Net(nn.Module):
    """A function that reads all other parts, the context and perhaps a shared mixing weight."""

    def __init__(self, width, dropout=0.0, alpha=None):
        super().__init__()
        self.first, self.last = nn.Linear(width, 32), nn.Linear(32, width)
        self.norm, self.dropout, self.alpha = nn.LayerNorm(width), nn.Dropout(dropout), alpha

    def forward(self, *inputs):
        x = self.norm(sum(inputs))
        y = self.last(self.dropout(self.first(x).relu()))
        return y if self.alpha is None else y * self.alpha.softmax(0)[0] + x * self.alpha.sum()


def sequence(depth=4, parts=2, dropout=0.0, alpha=None, make=Net, **options):
    torch.manual_seed(0)
    width = WIDTH // parts
    blocks = [
        nn.ModuleList(make(width, dropout, alpha) for _ in range(parts)) for _ in range(depth)
    ]
    return ReversibleSequence(blocks, MultiSplit(parts), **options)


def grads(model, x, *context, seed=1):
    """Output and every gradient of one step, and the next random number."""
    torch.manual_seed(seed)
    model.zero_grad()
    x, *context = (t.detach().clone().requires_grad_() for t in (x, *context))
    y = model(x, *context)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    (y * weights.view_as(y)).sum().backward()
    found = [y.detach(), x.grad, *(c.grad for c in context)]
    return [*found, *(p.grad.clone() for p in model.parameters()), torch.rand(3)]


def both(model, x, *context):
    reversible = grads(model, x, *context)
    model.reversible = False
    return zip(reversible, grads(model, x, *context), strict=True)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_equal_plain_autograd_in_fp64(parts, dropout):
    alpha = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    model = sequence(6, parts, dropout, alpha).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    context = torch.randn(2, 5, WIDTH // parts, dtype=torch.float64)
    for got, want in both(model, x, context):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    assert alpha.grad.abs().min() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="replays the generator of a GPU")
def test_dropout_on_a_gpu():
    model = sequence(6, 3, 0.3).double().cuda()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, device="cuda")
    for got, want in both(model, x):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_two_parts_by_hand():
    model = sequence(1)
    f, g = model.blocks[0]
    x = torch.randn(3, WIDTH)
    x1, x2 = x.chunk(2, -1)
    y1 = x1 + f(x2)
    torch.testing.assert_close(model(x), torch.cat([y1, x2 + g(y1)], -1))


def test_three_parts_see_new_parts_before_and_old_parts_after():
    class Weigh(nn.Module):
        def forward(self, a, b):
            return 10 * a + 100 * b

    model = ReversibleSequence([nn.ModuleList(Weigh() for _ in range(3))], MultiSplit(3))
    # y1 = 1 + 10*2 + 100*3, y2 = 2 + 10*y1 + 100*3, y3 = 3 + 10*y1 + 100*y2
    assert model(torch.tensor([1.0, 2.0, 3.0])).tolist() == [321, 3512, 354413]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("parts", [2, 3])
def test_inverse_over_12_layers(dtype, limit, parts):
    model, x = sequence(12, parts).to(dtype), torch.randn(4, 8, WIDTH, dtype=dtype)
    with torch.no_grad():
        assert (model.inverse(model(x)) - x).abs().max() <= limit


def test_fp32_gradients_over_12_layers():
    for got, want in both(sequence(12), torch.randn(4, 8, WIDTH)):
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_shared_blocks_a_shared_function_and_a_frozen_block():
    block = nn.ModuleList(Net(WIDTH // 2) for _ in range(2))
    frozen = copy.deepcopy(block).requires_grad_(False)
    twice = nn.ModuleList([block[0], block[0]])
    model = ReversibleSequence([block, frozen, block, twice], MultiSplit()).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def step():
        return torch.autograd.grad(model(x).sin().sum(), [x, *block.parameters()])

    got = step()
    model.reversible = False
    for a, b in zip(got, step(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_input_that_needs_no_gradient_and_a_second_backward():
    model, x = sequence(dropout=0.3).double(), torch.randn(3, WIDTH, dtype=torch.float64)
    y = model(x)
    y.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    y.sum().backward()
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)


def test_no_graph_without_gradients():
    model = sequence()
    with torch.no_grad():
        assert not model(torch.randn(2, WIDTH)).requires_grad
    model.requires_grad_(False)
    assert not model(torch.randn(2, WIDTH)).requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_saved_bytes_are_constant_in_depth(dropout):
    x = torch.randn(8, 16, WIDTH)
    kept = {}
    for depth in (2, 8):
        model = sequence(depth, dropout=dropout)
        kept[depth] = saved_bytes(lambda m=model: m(x), model, [x])
        states = 2 * depth * 5056 if dropout else 0
        assert kept[depth] == x.numel() * 4 + 2 * PROBES * 4 + states
        model.reversible = False
        kept[depth, "plain"] = saved_bytes(lambda m=model: m(x), model, [x])
    assert kept[8, "plain"] >= 3.9 * kept[2, "plain"]


@pytest.mark.parametrize("backend", ["logical", "allocator"])
def test_peak_is_constant_in_depth(backend):
    """Besides gradients, which are as large as parameters."""
    gc.collect()
    x, above = torch.randn(16, 16, WIDTH), {}
    for depth in (2, 8):
        for reversible in (True, False):
            model = sequence(depth, reversible=reversible)
            model(x).sum().backward()
            model.zero_grad()
            with Meter(model, inputs=x, backend=backend) as meter:
                model(x).sum().backward()
            weights = sum(p.numel() * 4 for p in model.parameters())
            above[depth, reversible] = meter.peak - meter.base - weights
    one_block = above[2, True]
    assert above[8, True] <= 1.01 * one_block
    assert above[8, False] >= 3 * above[2, False]


@pytest.mark.parametrize("reversible", [True, False])
def test_predicted_equals_measured(reversible):
    def step(model, _, x):
        model(x).sum().backward()
        model.zero_grad()

    def build():
        return sequence(3, 3, 0.2, reversible=reversible), None, torch.ones(4, 5, WIDTH)

    model, _, x = build()
    step(model, None, x)
    with Meter(model, inputs=x) as meter:
        step(model, None, x)
    assert predict(build, step).peak == meter.peak


def test_saved_tensor_hooks_may_return_copies():
    model, x = sequence(2, 3, 0.2).double(), torch.randn(3, WIDTH, dtype=torch.float64)
    context = torch.randn(3, WIDTH // 3, dtype=torch.float64)
    want = grads(model, x, context)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        got = grads(model, x, context)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_replayed():
    model, x = sequence(), torch.randn(3, 5, WIDTH)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    wrapped = Cast()
    got = grads(wrapped, x)
    assert got[0].dtype == torch.float32
    model.reversible = False
    for a, b in zip(got, grads(wrapped, x), strict=True):
        # Plain autocast casts a weight once and sums its gradient there; here each use casts.
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_autocast_keeps_no_cast_without_a_graph():
    model, x = sequence(1), torch.randn(3, WIDTH)
    linear = model.blocks[0][0].first
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        linear(x[:, : WIDTH // 2]).sum().backward()
    assert linear.weight.grad is not None


def test_bf16_stream_drifts_and_fp32_stream_hardly():
    x, drift = torch.randn(8, 16, WIDTH).bfloat16(), {}
    half, full = sequence(12).bfloat16(), sequence(12)
    with torch.no_grad():
        drift["bf16"] = (half.inverse(half(x)) - x).float().norm() / x.float().norm()
        with torch.autocast("cpu", torch.bfloat16):
            drift["fp32"] = (full.inverse(full(x.float())) - x.float()).norm() / x.float().norm()
    assert drift["fp32"] < 5e-4 < drift["bf16"] < 0.02
    got, want = zip(*both(half, x), strict=True)
    got, want = (torch.cat([g.flatten() for g in found[1:-1]]).float() for found in (got, want))
    assert (got - want).norm() < 0.05 * want.norm()


class Normed(nn.Module):
    def __init__(self, width, *_):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_updates_its_statistics_once(momentum):
    model = sequence(3, make=Normed).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.momentum = momentum
    plain = copy.deepcopy(model)
    plain.reversible = False
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    for _ in range(2):
        for a, b in zip(grads(model, x), grads(plain, x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert model.blocks[0][0].norm.num_batches_tracked == 2
    assert model.blocks[0][0].norm.track_running_stats
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_other_state_updated_in_forward_is_refused():
    model = sequence(1, make=lambda width, *_: spectral_norm(nn.Linear(width, width)))
    with pytest.raises(UsageError, match=r"updates its buffer '_u' in forward.*eval mode"):
        model(torch.randn(3, WIDTH))
    model.eval()
    model(torch.randn(3, WIDTH)).sum().backward()


class Hidden(nn.Module):
    """Dropout by a generator that nobody can replay."""

    def __init__(self, width, *_):
        super().__init__()
        self.linear, self.random = nn.Linear(width, width), random.Random(0)

    def forward(self, x):
        kept = [self.random.random() > 0.5 for _ in range(x.shape[-1])]
        return self.linear(x) * 2.0 * torch.tensor(kept)


def test_dropout_that_is_not_replayed_is_an_error():
    with pytest.raises(HoldfastError, match=r"off by .* did not repeat itself.*default generators"):
        sequence(6, make=Hidden)(torch.randn(3, WIDTH)).sum().backward()


def test_values_that_outgrow_their_dtype_are_an_error():
    class Grow(nn.Module):
        def forward(self, x):
            return 1e9 * x.cos()

    model = ReversibleSequence([nn.ModuleList([Grow(), Grow()])] * 3, MultiSplit())
    x = torch.randn(3, WIDTH, requires_grad=True)
    with pytest.raises(HoldfastError, match=r"off by .*rounding was amplified"):
        model(x).sum().backward()


def test_tensor_from_outside_is_an_error():
    scale = torch.ones(3, requires_grad=True)

    class Closure(nn.Module):
        def forward(self, x):
            return x * scale.sum()

    model = ReversibleSequence([nn.ModuleList([Closure(), Closure()])], MultiSplit())
    x = torch.randn(3, WIDTH, requires_grad=True)
    with pytest.raises(
        HoldfastError, match=r"Closure reads a tensor of \(3,\).*pass it as context"
    ):
        model(x).sum().backward()


def test_parameters_changed_before_backward_are_an_error():
    model = sequence(1)
    y = model(torch.randn(3, WIDTH))
    with torch.no_grad():
        model.blocks[0][0].first.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused():
    model, x = sequence(1), torch.randn(3, WIDTH, requires_grad=True)
    with pytest.raises(HoldfastError, match="Reversible has no double backward"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


class Wrong(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


@pytest.mark.parametrize(
    "result", [lambda x: x[:, :1], lambda x: x.double()], ids=["shape", "dtype"]
)
def test_wrong_results_are_refused(result):
    model = ReversibleSequence([nn.ModuleList([Wrong(result), Wrong(result)])], MultiSplit())
    with pytest.raises(UsageError, match=r"Wrong returned .* for a part of \(3, 12\)"):
        model(torch.randn(3, WIDTH))


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match=r"has 25 elements.*into 2 equal parts; use 24 or 26"):
        sequence()(torch.randn(3, 25))
    with pytest.raises(UsageError, match=r"x is torch\.int64"):
        sequence()(torch.ones(3, WIDTH, dtype=torch.int64))
    with pytest.raises(UsageError, match="block 0 has 3 functions for 2 parts"):
        ReversibleSequence([nn.ModuleList([nn.Identity()] * 3)], MultiSplit(2))
    with pytest.raises(UsageError, match="one block or more"):
        ReversibleSequence([], MultiSplit(2))
    with pytest.raises(UsageError, match="a coupling of 1 part"):
        MultiSplit(1)
