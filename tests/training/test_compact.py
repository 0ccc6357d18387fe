import copy
import gc
import io
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, Training
from holdfast.plan.fit import fit
from holdfast.plan.models import loss_of, resolve
from holdfast.training import checkpoint as files
from holdfast.training.data import DataSource
from holdfast.training.optim import state_optimizer
from holdfast.training.run import Run, Settings
from holdfast.training.saved import compact as module
from holdfast.training.saved import saved_bytes
from holdfast.training.saved.compact import CompActAdamW, Sketch, compact
from holdfast.training.step import StepInBackward

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(width=12, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(width, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 6)]
    return nn.Sequential(*layers)


def dense(sketch):
    return torch.cat([tile for _, tile in sketch.tiles()])


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {k: v for k, v in LLAMA.items() if k != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**fields | changes))


def test_output_and_other_gradients_are_exact():
    plain = net()
    lean = compact(copy.deepcopy(plain))
    x = matrix(2, 5, 12)
    results = []
    for model in (plain, lean):
        inner = x.clone().requires_grad_()
        y = model(inner)
        biases = [model[0].bias, model[3].bias]
        results.append([y, *torch.autograd.grad(y.square().sum(), [inner, *biases])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_compressed_gradient_is_the_gradient_times_p():
    plain = net()
    lean = compact(copy.deepcopy(plain), 0.5)
    x = matrix(2, 5, 12)
    for model in (plain, lean):
        model(x).square().sum().backward()
    for i in (0, 3):
        assert lean[i].weight.grad is None
        want = plain[i].weight.grad @ dense(lean[i].sketch)
        torch.testing.assert_close(lean[i].low.grad, want, atol=1e-5, rtol=1e-4)


def test_estimate_is_unbiased():
    """The mean of 2,000 draws of ĜPᵀ lies within 4 standard errors of G, everywhere."""
    x, gy = matrix(7, 6), matrix(7, 4, seed=1)
    draws = []
    for seed in range(2000):
        layer = compact(nn.Sequential(nn.Linear(6, 4, bias=False)), 0.5, seed=seed)[0]
        layer(x).backward(gy)
        draws.append(layer.low.grad @ dense(layer.sketch).mT)
    got = torch.stack(draws).double()
    error = got.std(0) / len(draws) ** 0.5
    assert ((got.mean(0) - gy.mT @ x).abs() <= 4 * error).all()
    assert error.min() > 0


def test_full_rank_orthogonal_p_is_adam_in_the_rotated_basis(monkeypatch):
    q = torch.linalg.qr(matrix(12, 12)).Q
    monkeypatch.setattr(Sketch, "tiles", lambda self, epoch=None: iter([(slice(0, 12), q)]))
    lean = compact(nn.Sequential(nn.Linear(12, 8, bias=False)), 1.0)
    rotated = nn.Parameter(lean[0].weight.detach() @ q)
    ours = CompActAdamW(lean.parameters(), 0.01, scale=1.0)
    adam = torch.optim.Adam([rotated], 0.01)
    for t in range(5):
        x = matrix(9, 12, seed=t)
        for optimizer, weight in ((ours, None), (adam, rotated)):
            optimizer.zero_grad()
            y = lean(x) if weight is None else x @ q @ weight.mT
            y.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(lean[0].weight @ q, rotated, atol=1e-5, rtol=0)


def test_tiles_of_p_do_not_change_the_step(monkeypatch):
    found = []
    for tile in (module.TILE, 40):
        monkeypatch.setattr(module, "TILE", tile)
        sketch = Sketch(matrix(10, 24), 8, 2, 0, False)
        p = dense(sketch)
        assert p.shape == (24, 8) and sketch.epoch == 0
        torch.testing.assert_close(sketch.compress(matrix(3, 24)), matrix(3, 24) @ p)
        want = 0.5 * sketch.weight + matrix(10, 8, seed=2) @ p.mT
        sketch.add_(matrix(10, 8, seed=2), 0.5)
        torch.testing.assert_close(sketch.weight, want)
        m = matrix(10, 8, seed=3)
        turned = m @ (p.mT @ dense(Sketch(sketch.weight, 8, 1, 0, False, steps=1))) / 3
        sketch.advance_(m, 2)
        torch.testing.assert_close(m, turned)
        found.append(len(list(sketch.tiles())))
    assert found[0] == 1 < found[1]


def test_saved_bytes_are_the_formula():
    plain = nn.Sequential(nn.Linear(64, 96, bias=False))
    x, tokens = matrix(10, 64), 10
    lean = compact(copy.deepcopy(plain), 0.25)
    assert saved_bytes(lambda: plain(x * 1), plain) == tokens * 64 * 4
    assert saved_bytes(lambda: lean(x * 1), lean) == tokens * 16 * 4
    with torch.no_grad():
        assert saved_bytes(lambda: lean(x * 1), lean) == 0
    lean[0].low.requires_grad_(False)
    assert saved_bytes(lambda: lean(x * 1), lean) == 0


class Attention(nn.Module):
    """Three linears that read one input, and two that read another."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "gate", "up"):
            setattr(self, name, nn.Linear(32, 32, bias=False))

    def forward(self, x):
        h = torch.cos(x)  # does not keep its output
        y = self.q(h) + self.k(h) + self.v(h)
        h = torch.cos(y)
        return self.gate(h) + self.up(h)


@pytest.mark.parametrize("recompute", [False, True])
def test_linears_of_one_input_share_one_z(recompute):
    model = compact(Attention(), 0.25)
    x = matrix(20, 32).requires_grad_()
    run = (lambda x: checkpoint(model, x, use_reentrant=False)) if recompute else model
    run(x).sum().backward()
    model.zero_grad(set_to_none=True)
    x.grad = None
    with Meter(model, inputs=x) as meter:
        loss = run(x).sum()
        kept = meter._storages.live_bytes() - meter.base
        loss.backward()
        model.zero_grad(set_to_none=True)
        x.grad = None
        del loss
    # Two z of 20 x 8, and y, which the second cosine keeps; the first keeps the caller's x.
    assert kept - 4 == (0 if recompute else 2 * 20 * 8 * 4 + 20 * 32 * 4)
    assert meter.end == meter.base
    assert not len(module._shared)


def test_an_input_that_lives_on_keeps_no_z():
    model, x = compact(net()), matrix(5, 12)
    model(x).sum().backward()
    assert x not in module._shared
    y = model(x)
    assert x in module._shared
    del x, y
    gc.collect()
    assert not len(module._shared)


def test_an_input_changed_in_place_gets_its_own_z():
    layer = compact(nn.Sequential(nn.Linear(8, 4, bias=False)))[0]
    x = matrix(5, 8)
    with torch.no_grad():
        want = (torch.ones(5, 4).mT @ (x + x.sin())) @ dense(layer.sketch)
    first = layer(x)
    x.add_(x.sin())
    (first * 0 + layer(x)).sum().backward()
    torch.testing.assert_close(layer.low.grad, want, atol=1e-5, rtol=1e-4)


def step(model, optimizer, seed=0, micro=1):
    optimizer.zero_grad()
    for i in range(micro):
        x = matrix(9, 12, seed=1000 * seed + i)
        (model(x) - x[:, :6]).square().mean().backward()
    optimizer.step()


def test_one_p_from_the_first_micro_batch_to_the_update(monkeypatch):
    """Also where the step at which P changes is made of several micro-batches."""
    model = compact(net(), gap=2)
    optimizer = CompActAdamW(model.parameters())
    used = []
    original = Sketch.tiles

    def watched(self, epoch=None):
        used.append(self.epoch if epoch is None else epoch)
        return original(self, epoch)

    monkeypatch.setattr(Sketch, "tiles", watched)
    epochs = []
    for t in range(5):
        used.clear()
        optimizer.zero_grad()
        for i in range(3):
            model(matrix(9, 12, seed=i)).sum().backward()
        forward = set(used)
        used.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Sketch, "advance_", lambda *a, **k: None)
            optimizer.step()
        assert forward == set(used) and len(forward) == 1
        epochs += forward
        for layer in (model[0], model[3]):
            layer.sketch.advance_(optimizer.state[layer.low]["exp_avg"], t + 1)
    assert epochs == [0, 0, 1, 1, 2]


def test_accumulation_adds_up():
    model = compact(net())
    xs = [matrix(4, 12, seed=i) for i in range(3)]
    for x in xs:
        model(x).sum().backward()
    summed = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(torch.cat(xs)).sum().backward()
    for got, p in zip(summed, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(got, p.grad, atol=1e-5, rtol=1e-4)


def test_clipping_sees_the_compressed_gradients():
    model = compact(net())
    model(matrix(5, 12)).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    total = torch.stack([p.grad.norm() for p in trained]).norm()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) == pytest.approx(total.item())
    clipped = torch.stack([p.grad.norm() for p in trained]).norm().item()
    assert clipped == pytest.approx(0.1, rel=1e-4)


def test_gradients_consumed_in_backward_give_the_same_steps():
    models = [compact(net(), gap=2) for _ in range(2)]
    for model, wrap in zip(models, (lambda o: o, StepInBackward), strict=True):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = wrap(CompActAdamW(trained, 0.05))
        for t in range(5):
            step(model, optimizer, t)
        assert (model[0].low.grad is None) == isinstance(optimizer, StepInBackward)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_dropout_draws_what_it_drew():
    plain = net(dropout=0.5)
    lean = compact(copy.deepcopy(plain))
    outputs = []
    for model in (plain, lean):
        torch.manual_seed(3)
        y = model(matrix(5, 12))
        y.sum().backward()
        CompActAdamW(model.parameters()).step()
        outputs.append((y, torch.rand(3)))
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)


def test_weight_decay_acts_on_the_whole_weight():
    model = compact(nn.Sequential(nn.Linear(8, 4, bias=False)))
    want = model[0].weight * 0.95
    model[0].low.grad = torch.zeros(4, 2)
    CompActAdamW(model.parameters(), 0.1, weight_decay=0.5).step()
    torch.testing.assert_close(model[0].weight, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_over_a_change_of_p(dtype, tmp_path):
    def build(seed):
        model = net().to(dtype)
        with torch.no_grad():
            model[0].bias.add_(seed)
        compact(model, gap=2)
        return model, CompActAdamW(model.parameters(), 0.05)

    def run(model, optimizer, steps):
        for t in steps:
            x = matrix(9, 12, seed=t).to(dtype)
            optimizer.zero_grad()
            (model(x) - x[:, :6]).square().mean().backward()
            optimizer.step()

    model, optimizer = build(0)
    run(model, optimizer, range(3))
    files.save(tmp_path, 3, model, optimizer, {})
    other, resumed = build(1)
    files.load(files.latest(tmp_path), other, resumed)
    assert other[0].sketch.epoch == 1
    for m, o in ((model, optimizer), (other, resumed)):
        run(m, o, range(3, 6))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_files_are_those_of_the_plain_model():
    plain = net()
    lean = compact(copy.deepcopy(plain))
    assert list(lean.state_dict()) == list(plain.state_dict())
    lean.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="bias"):
        lean.load_state_dict({"0.weight": plain[0].weight}, strict=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "convert"])
def test_copies_and_conversions_stay_tied_and_small(how):
    model = compact(net(), gap=2)
    step(model, CompActAdamW(model.parameters(), 0.05))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model).double().float()
    layer = other[0]
    assert layer.low.untyped_storage().nbytes() == 4 and layer.low.shape == (16, 3)
    assert layer.low.sketch is layer.sketch and layer.sketch.weight is layer.weight
    assert layer.sketch is not model[0].sketch and layer.sketch.steps == 1
    before = layer.weight.detach().clone()
    step(other, CompActAdamW(other.parameters(), 0.05))
    assert not torch.equal(layer.weight, before)
    assert torch.equal(model[0].weight, before)


def test_autocast_and_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    model = compact(GPT2LMHeadModel(config), 0.5)
    optimizer = CompActAdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.low.shape == (96, 16) and layer.weight.shape == (32, 96)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.low.grad.dtype is torch.float32
    assert losses[-1] < 0.8 * losses[0]


def test_state_and_gradient_bytes_are_the_formula():
    model = compact(nn.Sequential(nn.Linear(64, 96, bias=False)), 0.25)
    optimizer = CompActAdamW(model.parameters())
    x = matrix(10, 64)

    def run():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    with Meter(model, optimizer, inputs=x) as meter:
        run()
    cells = meter.ledger.column("device", "step")
    m, n, r, b = 96, 64, 16, 4
    assert cells["parameters"] == m * n * b + b
    assert cells["gradients"] == m * r * b
    assert cells["optimizer"] == 8 * m * r + 4
    assert meter.end == meter.base


COMPACT = {"saved": [{"compact": {}}], "optimizer": {"compact_adamw": {}}}


@pytest.mark.parametrize(
    ("methods", "accumulation"),
    [
        (COMPACT, 1),
        (COMPACT, 2),
        ({**COMPACT, "gradients": "backward"}, 1),
        ({**COMPACT, "saved": [{"compact": {"ratio": 0.5}}, {"memsave": {}}]}, 1),
        ({**COMPACT, "blocks": {"model.layers": "recompute*4"}}, 1),
    ],
    ids=["step", "accumulate", "backward", "memsave", "recompute"],
)
def test_prediction_equals_measurement(methods, accumulation):
    planned, source = Methods(**methods), resolve(LLAMA)
    option = "recompute" if planned.blocks else "keep"
    family = trace_family(
        lambda: source.build("meta", torch.float32),
        lambda: source.example_inputs(2, 32, "cpu", torch.float32),
        lambda model: apply.prepare(model, planned),
        lambda model, batch: loss_of(model(**batch)),
        {option: lambda block: apply.set_option(block, option, None)},
        lambda flops, moved, dtype: 0.0,
    )
    kept = planned.model_copy(update={"gradients": "step"})
    costs = UpdateCosts(
        lambda ps: apply.make_optimizer([(str(i), p) for i, p in enumerate(ps)], kept, 1e-3, 0.0),
        lambda flops, moved, dtype: 0.0,
    )
    composer = Composer(family, Life(planned.gradients == "backward", accumulation), costs)
    predicted = composer.ledger(composer.uniform(option))

    model = apply.prepare(source.build("cpu", torch.float32), planned)
    apply.set_blocks(model, planned.blocks, {})
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = apply.make_optimizer(named, planned, 1e-3, 0.0)
    batches = [source.example_inputs(2, 32, "cpu", torch.float32) for _ in range(accumulation)]

    def run():
        for batch in batches:
            loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for layer in model.modules():
        if hasattr(layer, "sketch"):
            layer.sketch.gap = 1  # P changes in every step, as the prediction assumes
    run()
    with Meter(model, optimizer, inputs=batches) as meter:
        run()
    for phase in meter.ledger.phases():
        got, want = (ledger.column("device", phase) for ledger in (predicted, meter.ledger))
        assert sum(got.values()) == sum(want.values()), (phase, got, want)
    assert predicted.peak() == meter.peak


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compact(net(), 0.0), r"ratio=0.0 is outside \(0, 1\]"),
        (lambda: compact(net(), 1.5), "ratio=1.5"),
        (lambda: compact(net(), gap=0), "gap=0 must be 1 step"),
        (lambda: compact(net().requires_grad_(False)), "no linear of Sequential"),
        (lambda: compact(compact(net())), "no linear of Sequential.*once"),
        (lambda: compact(llama(tie_word_embeddings=True), targets="lm_head"), "are one tensor"),
        (lambda: CompActAdamW(net().parameters(), scale=0.0), "scale=0.0 must be > 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_double_backward_is_refused():
    model, x = compact(net()), matrix(3, 12).requires_grad_()
    with pytest.raises(HoldfastError, match="no double backward"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_the_planner_wants_both_halves():
    for methods in ({"saved": [{"compact": {}}]}, {"optimizer": {"compact_adamw": {}}}):
        with pytest.raises(UsageError, match="needs compact"):
            apply.prepare(net(), Methods(**methods))


def test_plain_parameters_take_plain_adamw():
    p, q = (nn.Parameter(matrix(5, 3)) for _ in "pq")
    ours, torchs = (
        CompActAdamW([p], 0.01, weight_decay=0.1),
        torch.optim.AdamW([q], 0.01, weight_decay=0.1),
    )
    for t in range(3):
        p.grad = q.grad = matrix(5, 3, seed=t)
        ours.step()
        torchs.step()
    torch.testing.assert_close(p, q)
    assert isinstance(ours, state_optimizer.StateOptimizer)


def test_fit_plans_it_where_it_is_named():
    common = {"task": "pretrain", "batch": 2, "sequence": 32, "dtype": "float32", "reserve": 0}
    named = fit(LLAMA, "8MiB", **common, methods=("compact", "compact_adamw"))
    methods = named.spec.methods
    assert methods.saved[0].keys() == {"compact"}
    assert methods.optimizer.keys() == {"compact_adamw"}
    plain = fit(LLAMA, "8MiB", **common, methods=("adamw",))
    assert named.predicted.peak("device") < plain.predicted.peak("device")


def test_a_run_within_its_prediction_opens_with_transformers(tmp_path):
    text, config = tmp_path / "text.txt", tmp_path / "config.json"
    text.write_text(" ".join(f"{i} squared is {i * i}." for i in range(100)))
    model = LLAMA | {"vocab_size": 264, "max_position_embeddings": 64}
    config.write_text(json.dumps(model))
    plan = fit(
        str(config), "8MiB", Training(learning_rate=1e-2, clip=1.0), clip=1.0, task="pretrain",
        batch=2, sequence=32, dtype="float32", reserve=0, methods=("compact", "compact_adamw"),
    )  # fmt: skip
    run = Run(plan, Settings(DataSource((str(text),)), steps=3), tmp_path / "out")
    report = run.run()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(run.out).eval()
        assert torch.equal(opened(ids).logits, run.model.eval()(ids).logits)
    assert report["loss"]["last"] < report["loss"]["first"]
    steps = report["measured"]["windows"]["steps"]
    assert steps == pytest.approx(report["predicted"]["peak_bytes"], rel=0.01)
