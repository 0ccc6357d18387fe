import copy

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.training.models.darts_reversible import (
    Architecture,
    DartsTransformer,
    FactorizedEmbedding,
    MixedOp,
    Pooled,
    darts,
)
from holdfast.training.models.operations import OPERATIONS, candidate
from holdfast.training.reversible import PROBES
from holdfast.training.saved import saved_bytes

FEW = ("conv3", "dynamic_conv3", "self_attention", "cross_attention", "glu", "zero", "identity")
SMALL = {
    "vocabulary": 11,
    "width": 24,
    "rank": 6,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "searched": 2,
    "heads": 2,
    "dropout": 0.0,
}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return DartsTransformer(**(SMALL | options))


def encoder(layers=2, **options):
    return build(**({"encoder_layers": layers, "decoder_layers": 0, "searched": 1} | options))


def batch(seed=0, size=3, source=7, target=5):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 11, (size, source), generator=g)
    ids[0, -2:] = 0
    labels = torch.randint(1, 11, (size, target), generator=g)
    labels[1, -1:] = -100
    return ids, labels


def labelled(seed=0, size=4, length=7):
    ids, labels = batch(seed, size, length, length)
    return ids, labels


def options(**more):
    return {"heads": 2, "causal": False, "memory_width": 8, "dropout": 0.0} | more


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_candidates_keep_the_shape_and_causal_ones_the_past(name, causal):
    torch.manual_seed(0)
    op = candidate(name, 6, **options(causal=causal))
    x, memory = torch.randn(2, 20, 6), torch.randn(2, 9, 8)
    mask = torch.ones(2, 9 if name == "cross_attention" else 20, dtype=torch.bool)
    y = op(x, mask, memory)
    assert y.shape == x.shape
    later = x.clone()
    later[:, 12:] += 1
    same = torch.isclose(op(later, mask, memory), y, atol=1e-5)[:, :12].all()
    sees_ahead = name.startswith(("conv", "dynamic")) or name == "self_attention"
    assert same == (causal or not sees_ahead)


@pytest.mark.parametrize("name", ["self_attention", "cross_attention"])
def test_attention_ignores_padding(name):
    op = candidate(name, 6, **options())
    x, memory = torch.randn(2, 9, 6), torch.randn(2, 9, 8)
    mask = torch.arange(9).expand(2, 9) < 7
    got = op(x, mask, memory)[:, :7]
    want = op(x[:, :7], None, memory[:, :7])
    torch.testing.assert_close(got, want)


def test_mixture_by_hand():
    alpha = nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))
    ops = {"a": nn.Identity(), "zero": candidate("zero", 4, **options()), "b": nn.Tanh()}
    mixed = MixedOp(ops, alpha)
    x, w = torch.randn(2, 4), alpha.softmax(0)
    torch.testing.assert_close(mixed(x), w[0] * x + w[2] * x.tanh())
    assert mixed.best() == "zero"


@pytest.mark.parametrize(("pool", "want"), [("max", [3.0, 5.0]), ("mean", [2.0, 4.5])])
def test_pooling_by_hand(pool, want):
    pooled = Pooled(2, nn.Identity(), pool)
    assert pooled(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.0])).tolist() == want


def gradients(model, *data):
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(*data)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_of_everything_equal_plain_autograd(dropout, pool):
    model = build(encoder_layers=3, decoder_layers=3, dropout=dropout, pool=pool).double()
    plain = copy.deepcopy(model)
    plain.encoder.reversible = plain.decoder.reversible = False
    got, want = gradients(model, *batch()), gradients(plain, *batch())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    alphas = [p for name, p in model.named_parameters() if name.endswith("alpha")]
    # Two layers of each side have their own; the third shares the first's.
    assert len(alphas) == 2 * 2 + 2 * 2
    assert all(alpha.grad.abs().min() > 0 for alpha in alphas)


def test_fp32_gradients_over_12_layers():
    model = encoder(12, operations=FEW)
    plain = copy.deepcopy(model)
    plain.encoder.reversible = False
    data = labelled()
    got, want = (torch.cat([g.flatten() for g in gradients(m, *data)]) for m in (model, plain))
    assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
def test_inverse_over_12_layers(dtype, limit):
    model = build(encoder_layers=12, decoder_layers=12, operations=FEW).to(dtype)
    mask = torch.ones(2, 9, dtype=torch.bool)
    x, y = (torch.randn(2, length, 24, dtype=dtype) for length in (9, 6))
    with torch.no_grad():
        memory = model.encoder(x, mask, None)
        # Relative to the stream, which identities make grow with depth.
        error = (model.encoder.inverse(memory, mask, None) - x).abs().max()
        assert error <= limit * memory.abs().max()
        out = model.decoder(y, mask, memory)
        error = (model.decoder.inverse(out, mask, memory) - y).abs().max()
        assert error <= limit * out.abs().max()


def test_saved_bytes_are_those_of_the_output_for_any_depth():
    x = torch.randn(3, 10, 24)
    mask = torch.ones(3, 10, dtype=torch.bool)
    kept = {}
    for layers in (1, 4):
        stack = encoder(layers).encoder
        known = [x, mask]
        assert saved_bytes(lambda s=stack: s(x, mask, None), stack, known) == (
            x.numel() * 4 + 2 * PROBES * 4
        )
        stack.reversible = False
        kept[layers] = saved_bytes(lambda s=stack: s(x, mask, None), stack, known)
    assert kept[4] >= 3.9 * kept[1]


def test_decoder_predicts_each_label_from_earlier_ones():
    model = build().eval()
    source, labels = batch()
    target = nn.functional.pad(labels[:, :-1].clamp(min=0), (1, 0))
    changed = target.clone()
    changed[:, 3:] = 4
    a, b = model.logits(source, target), model.logits(source, changed)
    assert a.shape == (3, 5, 11)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])
    want = nn.functional.cross_entropy(a.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(source, labels), want)


def test_embedding_is_factorised():
    embedding = FactorizedEmbedding(100, 4, 16)
    assert sum(p.numel() for p in embedding.parameters()) == 100 * 4 + 4 * 16
    table = embedding(torch.arange(100))
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(embedding.logits(hidden), hidden @ table.T / 4)


def split(model):
    alphas = {id(m.alpha) for m in model.modules() if isinstance(m, MixedOp)}
    return {
        "alpha": [p.detach().clone() for p in model.parameters() if id(p) in alphas],
        "weights": [p.detach().clone() for p in model.parameters() if id(p) not in alphas],
    }


def changed(before, after):
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_search_moves_weights_by_train_and_mixtures_by_val():
    base = encoder(operations=FEW)

    def searched(train, val, **rates):
        model = copy.deepcopy(base)
        darts(model, [labelled(s) for s in train], [labelled(s) for s in val], **rates)
        return split(model)

    start = split(base)
    still = {"lr": 0.0, "alpha_lr": 0.0, "warmup": 1}
    only_alpha = searched([1, 2], [3], **(still | {"alpha_lr": 0.1}))
    assert changed(only_alpha["alpha"], start["alpha"])
    assert not changed(only_alpha["weights"], start["weights"])
    other_train = searched([4, 5], [3], **(still | {"alpha_lr": 0.1}))
    assert not changed(only_alpha["alpha"], other_train["alpha"])
    other_val = searched([1, 2], [6], **(still | {"alpha_lr": 0.1}))
    assert changed(only_alpha["alpha"], other_val["alpha"])
    only_weights = searched([1, 2], [3], **(still | {"lr": 0.01}))
    assert not changed(only_weights["alpha"], start["alpha"])
    assert changed(only_weights["weights"], start["weights"])
    other_val = searched([1, 2], [6], **(still | {"lr": 0.01}))
    assert not changed(only_weights["weights"], other_val["weights"])


def test_search_equals_that_of_plain_autograd():
    models = [encoder(operations=FEW, dropout=0.1).double() for _ in range(2)]
    models[1].encoder.reversible = False
    for model in models:
        torch.manual_seed(3)
        darts(model, [labelled(s) for s in range(4)], [labelled(9)], lr=1e-3, warmup=1)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_warm_up_then_inverse_root():
    """Adam's first steps have the size of the rate, so the path says what the rate was."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(()))
            self.mixed = MixedOp({"a": nn.Identity()}, nn.Parameter(torch.zeros(1)))
            self.path = []

        def forward(self, source, labels):
            self.path.append(self.x.item())
            return self.mixed(self.x)

        def architecture(self):
            return Architecture(())

    line = Line()
    darts(line, [(None, None)] * 9, [(None, None)], lr=1.0, warmup=4)
    path = torch.tensor(line.path[1::2] + [line.x.item()])
    want = torch.tensor([min(s / 4, (4 / s) ** 0.5) for s in range(1, 10)])
    torch.testing.assert_close(-path.diff(), want, atol=1e-4, rtol=1e-4)


def test_search_leaves_no_gradients_and_what_was_frozen():
    model = encoder(operations=FEW)
    model.embedding.requires_grad_(False)
    before = model.embedding.tokens.weight.clone()
    found = darts(model, [labelled(1)], [labelled(2)], lr=0.1, warmup=1)
    assert torch.equal(model.embedding.tokens.weight, before)
    assert not any(p.requires_grad for p in model.embedding.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert found == model.architecture()


def test_architecture_is_the_argmax_and_can_be_retrained():
    model = build(encoder_layers=3, decoder_layers=3)
    for side, want in (
        ("encoder", [["ffn", "zero"], ["glu", "conv5"]]),
        ("decoder", [["cross_attention", "ffn"], ["identity", "conv3"]]),
    ):
        for layer, names in zip(getattr(model, side).blocks, want, strict=False):
            for pooled, name in zip(layer, names, strict=False):
                mixed = pooled.operation
                with torch.no_grad():
                    mixed.alpha[list(mixed.candidates).index(name)] = 9
    found = model.architecture()
    assert found == Architecture(
        (("ffn", "zero"), ("glu", "conv5")), (("cross_attention", "ffn"), ("identity", "conv3"))
    )
    plain = build(encoder_layers=3, decoder_layers=3, architecture=found)
    assert not plain.encoder.reversible and not plain.decoder.reversible
    assert not any(isinstance(m, MixedOp) for m in plain.modules())
    kinds = [type(f.operation).__name__ for layer in plain.encoder.blocks for f in layer]
    assert kinds == ["Residual", "Zero", "Residual", "Residual", "Residual", "Zero"]
    gradients(plain, *batch())
    assert plain.decoder.blocks[2][2].operation.operation.cross
    with pytest.raises(UsageError, match="was built from an architecture"):
        plain.architecture()
    with pytest.raises(UsageError, match="no mixtures to search"):
        darts(plain, [batch()], [batch()])


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match=r"width 25 does not split into the 2 parts.*use 26"):
        build(width=25)
    with pytest.raises(UsageError, match="width 28 does not split into the 3 parts of the decoder"):
        build(width=28)
    with pytest.raises(UsageError, match="part of width 12 does not split into 5 heads"):
        build(heads=5)
    with pytest.raises(UsageError, match=r"1 layer\(s\) of the encoder cannot hold 2"):
        build(encoder_layers=1)
    with pytest.raises(
        UsageError, match=r"encoder of the architecture is \(\('ffn',\),\).*names of 2"
    ):
        encoder(architecture=Architecture((("ffn",),)))
    with pytest.raises(UsageError, match=r"unknown operation 'conv4'.*conv3"):
        build(operations=("conv4",))
    with pytest.raises(UsageError, match="unknown pool 'sum'"):
        build(pool="sum")
    with pytest.raises(UsageError, match="use it in a decoder only"):
        candidate("cross_attention", 4, **options(memory_width=None))
    with pytest.raises(UsageError, match=r"alpha has shape \(2,\) for 1 candidates"):
        MixedOp({"a": nn.Identity()}, nn.Parameter(torch.zeros(2)))
    with pytest.raises(UsageError, match="not an iterator"):
        darts(encoder(operations=FEW), [labelled()] * 2, iter([labelled()]))
