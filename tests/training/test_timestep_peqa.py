import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.errors import UsageError
from holdfast.forms.bits import unpack
from holdfast.training import adapters
from holdfast.training.adapters import timestep_peqa
from holdfast.training.adapters.timestep_peqa import (
    PEQAConv2d,
    TimestepScales,
    quantize_denoiser,
)
from holdfast.training.saved import saved_bytes

CONVS = {
    "plain": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 5, (3, 2), stride=2, dilation=2, bias=False),
    "groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "pointwise": lambda: nn.Conv2d(6, 40, 1),
}


def dense_ref(layer):
    """The filters as autograd would see them: s (1 + c) (q - z), all at once."""
    q = unpack(layer.codes, layer.bits, layer.columns).float()
    s = layer.scale * (1 + layer.scale_change)
    centred = q.unflatten(1, (s.shape[1], -1)) - layer.zeros[..., None].float()
    return (s[..., None] * centred).flatten(1).view(len(q), *layer.kernel_shape)


@pytest.mark.parametrize("tile", [1 << 20, 60])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", CONVS)
def test_convolution_equals_dense(name, bits, tile, monkeypatch):
    monkeypatch.setattr(timestep_peqa, "TILE", tile)
    torch.manual_seed(0)
    conv = CONVS[name]()
    layer = PEQAConv2d(conv, bits=bits, group=3 if conv.groups == 1 else None)
    with torch.no_grad():
        layer.scale_change.copy_(torch.rand_like(layer.scale))
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    want = F.conv2d(x, dense_ref(layer), layer.bias, *options)
    got = layer(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    leaves = [x, layer.scale_change]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_convolution_keeps_x_and_the_scales_alone():
    layer = PEQAConv2d(nn.Conv2d(6, 10, 3, padding=1))
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x * 1), layer) == x.nbytes + layer.scale.nbytes


def test_the_two_sides_of_a_concatenation_have_scales_of_their_own():
    conv = nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        conv.weight[:, 4:] *= 100
    error = [
        (dense_ref(PEQAConv2d(conv, bits=3, group=group)) - conv.weight)[:, :4].abs().mean()
        for group in (None, 4)
    ]
    assert error[1] < error[0] / 2


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 8, 3, padding=1)
        self.time = nn.Linear(4, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 2, 1)

    def forward(self, sample, timestep, label=None, *, scale=1.0):
        t = timestep * torch.ones(len(sample)) / 100
        emb = self.time(torch.stack([t, t**2, t.sin(), t.cos()], 1))[..., None, None]
        h = torch.tanh(self.enter(sample) + emb)
        if label is not None:
            h = h + label[:, None, None, None]
        return {"sample": self.leave(torch.tanh(self.middle(h))) * scale}


def denoiser(bits=4):
    torch.manual_seed(0)
    return quantize_denoiser(Denoiser(), bits, exclude=["leave"])


X, EARLY, LATE = torch.randn(6, 2, 5, 5), torch.tensor(10), torch.tensor(90)


def test_quantized_denoiser_trains_scales_alone():
    model = denoiser()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{name}.scale_change" for name in ("enter", "time", "middle")
    ]
    assert isinstance(model.leave, nn.Conv2d)
    torch.manual_seed(0)
    given = Denoiser()
    torch.testing.assert_close(model(X, 50)["sample"], given(X, 50)["sample"], atol=0.1, rtol=0)


def train(model, parameters, timesteps, steps=3):
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        t = timesteps[torch.randint(len(timesteps), (6,), generator=generator)]
        optimizer.zero_grad()
        model(X, t)["sample"].square().mean().backward()
        optimizer.step()


def test_one_interval_is_peqa_bit_for_bit():
    plain, sets = denoiser(), denoiser()
    scales = TimestepScales(sets, [0, 100])
    own = [p for p in plain.parameters() if p.requires_grad]
    train(plain, own, torch.arange(100))
    train(sets, scales.parameters(), torch.arange(100))
    assert torch.equal(plain(X, EARLY)["sample"], sets(X, EARLY)["sample"])
    for a, b in zip(own, scales.parameters(), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0


def test_outside_its_interval_a_trained_set_changes_nothing():
    model = denoiser()
    before = {t: model(X, t)["sample"] for t in (EARLY, LATE)}
    scales = TimestepScales(model, [0, 50, 100], trained=[1])
    trained = [p for p in scales.parameters() if p.requires_grad]
    assert len(trained) == 3
    train(model, trained, torch.arange(100))
    assert torch.equal(model(X, EARLY)["sample"], before[EARLY])
    assert not torch.equal(model(X, LATE)["sample"], before[LATE])


def test_only_the_scales_of_the_interval_get_a_gradient():
    model = denoiser()
    codes = {n: b.clone() for n, b in model.named_buffers()}
    scales = TimestepScales(model, [0, 25, 50, 100])
    model(X, torch.full((6,), 30))["sample"].sum().backward()
    for k in range(3):
        assert all((p.grad is not None) == (k == 1) for p in scales.sets[k])
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers())


def test_a_mixed_batch_is_each_sample_by_itself():
    model = denoiser()
    scales = TimestepScales(model, [0, 25, 50, 100])
    with torch.no_grad():
        for k, changes in enumerate(scales.sets):
            for p in changes:
                p.fill_(0.3 * k)
    t, label = torch.tensor([60, 3, 25, 24, 99, 49]), torch.linspace(-1, 1, 6)
    mixed = model(X, timestep=t, label=label, scale=2.0)["sample"]
    for i in range(6):
        one = model(X[i : i + 1], t[i], label[i : i + 1], scale=2.0)["sample"]
        torch.testing.assert_close(mixed[i : i + 1], one, atol=1e-6, rtol=1e-5)
    (mixed * torch.randn_like(mixed)).sum().backward()
    together = [p.grad.clone() for p in scales.parameters()]
    assert all(g.abs().max() > 0 for g in together)


def test_at_gives_parts_of_the_model_their_set():
    model = denoiser()
    scales = TimestepScales(model, [0, 50, 100])
    nn.init.constant_(scales.sets[1][2], 0.5)
    h = torch.randn(1, 8, 5, 5)
    idle = model.middle(h)
    with scales.at(70):
        inside = model.middle(h)
        with scales.at(EARLY):
            assert torch.equal(model.middle(h), idle)
    torch.testing.assert_close(inside - idle, 0.5 * (idle - model.middle.bias[:, None, None]))
    assert torch.equal(model.middle(h), idle)


def test_bytes_equal_codes_and_one_set_per_interval():
    model = denoiser()
    held = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    scales = TimestepScales(model, [0, 20, 40, 60, 100])
    size = 8 + 8 + 8  # one scale an output
    assert sum(p.nbytes for p in scales.parameters()) == 4 * 4 * size
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *scales.parameters())}
    total = sum(t.untyped_storage().nbytes() for t in tensors.values())
    assert total == held + 3 * 4 * size  # the first set is the one that was there


def test_a_task_is_its_sets():
    model, twin = denoiser(), denoiser()
    scales = TimestepScales(model, [0, 50, 100])
    train(model, scales.parameters(), torch.arange(100))
    state = scales.state_dict()
    assert len(state) == 6
    other = TimestepScales(twin, [0, 50, 100])
    other.load_state_dict(state)
    t = torch.tensor([1, 99, 49, 50, 0, 77])
    assert torch.equal(twin(X, t)["sample"], model(X, t)["sample"])


def test_remove_leaves_one_set():
    model = denoiser()
    scales = TimestepScales(model, [0, 50, 100])
    train(model, scales.parameters(), torch.arange(100))
    want = model(X, LATE)["sample"]
    assert scales.remove(keep=1) is model
    assert "forward" not in vars(model)
    assert torch.equal(model(X, LATE)["sample"], want)
    assert not torch.equal(model(X, EARLY)["sample"], want)


def test_works_on_a_model_with_the_peqa_adapter():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    adapters.attach(model, "peqa")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, t):
            return self.inner(x)

    outer = Wrapped()
    scales = TimestepScales(outer, [0, 10, 20], timestep="t")
    outer(torch.randn(3, 4), torch.tensor([1, 11, 2])).sum().backward()
    assert all(p.grad is not None for p in scales.parameters())


@pytest.mark.parametrize(
    ("edges", "options", "message"),
    [
        ([0, 50, 40, 100], {}, r"edges=\[0, 50, 40, 100\] overlap"),
        ([0, 50, 50], {}, "overlap or are empty"),
        ([0], {}, "overlap or are empty"),
        ([0, 100], {"trained": [1]}, r"trained=\[1\], but the intervals"),
        ([0, 100], {"timestep": "time"}, "unknown argument of the model 'time'"),
    ],
)
def test_bad_edges(edges, options, message):
    model = denoiser()
    with pytest.raises(UsageError, match=message):
        TimestepScales(model, edges, **options)
    assert "forward" not in vars(model)


def test_bad_use():
    model = denoiser()
    scales = TimestepScales(model, [10, 50, 100])
    with pytest.raises(UsageError, match=r"timestep 5 lies in no interval of \[10, 50, 100\]"):
        model(X, torch.tensor([5, 20, 30, 40, 50, 60]))
    with pytest.raises(UsageError, match="timesteps of 2 intervals at once"):
        with scales.at(torch.tensor([20, 60])):
            pass
    model.gradient_checkpointing = True
    with pytest.raises(UsageError, match="recomputes in backward"):
        model(X, EARLY)
    with pytest.raises(UsageError, match="no PEQA layer"):
        TimestepScales(Denoiser(), [0, 100])
    with pytest.raises(UsageError, match=r"unknown linear or convolution 'leaf'; nearest .*leave"):
        quantize_denoiser(Denoiser(), exclude=["leaf"])
    with pytest.raises(UsageError, match="group=4 does not divide the 6"):
        PEQAConv2d(nn.Conv2d(6, 2, 3), group=4)
    with pytest.raises(UsageError, match="bits=5 is not a size"):
        PEQAConv2d(nn.Conv2d(6, 2, 3), bits=5)
    with pytest.raises(UsageError, match="padding='same'"):
        PEQAConv2d(nn.Conv2d(6, 2, 3, padding="same"))


def test_bfloat16_and_autocast():
    model = denoiser().bfloat16()
    TimestepScales(model, [0, 100])
    layer = model.middle
    assert layer(torch.randn(1, 8, 5, 5).bfloat16()).dtype == torch.bfloat16
    conv = PEQAConv2d(nn.Conv2d(2, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(torch.randn(1, 2, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.scale_change.grad.dtype == torch.float32
