import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from holdfast.errors import UsageError
from holdfast.training.adapters import attach, load, save
from holdfast.training.adapters.randlora import METHOD, Bases, RandLoRA


def randlora_ref(x, linear, layer):
    """Sum over bases of B_j Lambda_j A Gamma_j, each written out, in the pairing of peft."""
    a, b = layer.bases.slices(layer.in_features, layer.out_features)
    lam, gamma = layer.randlora_lambda, layer.randlora_gamma
    rank, count = lam.shape
    total = 0
    for k in range(rank * count):  # row k of the product A meets column k of B
        i, j = divmod(k, count)
        total = total + b[:, k, None].float() * (lam[i, j] * a[i].float() * gamma[j])
    delta = total if layer.in_features <= layer.out_features else total.T
    return linear(x) + layer.scale * (x @ delta.T)


def started(linear, rank=3, **knobs):
    bases = Bases(
        [(linear.nx, linear.nf) if isinstance(linear, Conv1D) else linear.weight.shape[::-1]],
        rank,
        0,
        torch.device("cpu"),
    )
    layer = RandLoRA(linear, bases=bases, rank=rank, **knobs)
    nn.init.normal_(layer.randlora_lambda)
    nn.init.normal_(layer.randlora_gamma)
    return layer


@pytest.mark.parametrize(
    "linear", [nn.Linear(7, 7), nn.Linear(7, 10), nn.Linear(10, 7, bias=False), Conv1D(10, 7)]
)
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_equals_reference(linear, shape):
    layer = started(linear)
    x = torch.randn(*shape, layer.in_features, requires_grad=True)
    got, want = layer(x), randlora_ref(x.unsqueeze(0), linear, layer).squeeze(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    leaves = [x, layer.randlora_lambda, layer.randlora_gamma]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 10), (10, 7), (9, 9)])
def test_equals_peft_with_copied_tensors(inputs, outputs):
    import peft

    linear = nn.Linear(inputs, outputs)
    ours = started(linear)
    theirs = peft.get_peft_model(
        nn.ModuleDict({"proj": linear}),
        peft.RandLoraConfig(r=3, randlora_alpha=60, target_modules=["proj"]),
    ).base_model.model["proj"]
    bases = ours.bases
    with torch.no_grad():
        theirs.randlora_lambda["default"].copy_(ours.randlora_lambda)
        theirs.randlora_gamma["default"].copy_(ours.randlora_gamma)
        theirs.randlora_A["default"].copy_(bases.A[:, None])
        theirs.randlora_B["default"].copy_(bases.B)
    x = torch.randn(4, inputs) / 100
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (24, 24)])
def test_update_has_full_rank(inputs, outputs):
    layer = started(nn.Linear(inputs, outputs), rank=5)
    assert torch.linalg.matrix_rank(layer.delta().double(), rtol=1e-6) == 24


def test_counts_by_hand_and_bases_once():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8))
    attach(model, "randlora", rank=3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 3 * (3 * (3 + 8))  # three linears with N = 3 bases, q = 8
    buffers = {
        b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in model.buffers()
    }
    assert sum(buffers.values()) == 2 * (3 * 8 + 12 * 3 * 3)
    assert not [key for key in model.state_dict() if "holdfast" in key]


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 40), (40, 16)])
def test_keeps_only_the_narrow_side(inputs, outputs):
    layer = started(nn.Linear(inputs, outputs).requires_grad_(False), rank=4)
    x = torch.randn(10, inputs, requires_grad=True)
    own = {t.data_ptr() for t in (*layer.parameters(), layer.weight)}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert sum(n for pointer, n in saved.items() if pointer not in own) == 4 * 10 * 16
    y.sum().backward()


def test_bases_of_smaller_linears_are_refused():
    bases = Bases([(8, 8)], 4, 0, torch.device("cpu"))
    with pytest.raises(UsageError, match="needs bases for 8 x 9, these are for 8 x 8"):
        RandLoRA(nn.Linear(8, 9), bases=bases, rank=4)
    with pytest.raises(UsageError, match="seed=1, but the bases are of rank 4, seed 0"):
        RandLoRA(nn.Linear(8, 8), bases=bases, rank=4, seed=1)


def test_other_seed_on_load_is_refused(tmp_path):
    save(attach(nn.Sequential(nn.Linear(8, 8)), "randlora", rank=4, seed=1), tmp_path)
    model = attach(nn.Sequential(nn.Linear(8, 8)), "randlora", rank=4)
    with pytest.raises(UsageError, match=r"'projection_prng_key': 0.*'projection_prng_key': 1"):
        load(model, tmp_path)
    assert load(nn.Sequential(nn.Linear(8, 8)), tmp_path)[0].bases.seed == 1


@pytest.mark.parametrize(
    ("knobs", "message"), [({"rank": 0}, "rank=0 has no bases"), ({"dropout": 1.0}, "outside")]
)
def test_bad_knobs_leave_the_model_alone(knobs, message):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UsageError, match=message):
        attach(model, "randlora", **knobs)
    assert type(model[0]) is nn.Linear
    assert list(dict(model.named_modules())) == ["", "0"]


def test_fake_tensors():
    with FakeTensorMode():
        model = attach(nn.Sequential(nn.Linear(512, 64)), "randlora")
        model(torch.randn(2, 512)).sum().backward()
        assert model[0].randlora_gamma.grad.shape == (2, 64)


def test_method_attaches():
    model = METHOD.apply(nn.Sequential(nn.Linear(64, 100)), **METHOD.defaults())
    assert model[0].randlora_gamma.shape == (2, 64)
