import numpy as np
import pytest
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast import fit, native
from holdfast.errors import UsageError
from holdfast.forms import maps
from holdfast.meter import Meter
from holdfast.native.adamw8 import SIGNED, UNSIGNED, largest
from holdfast.plan.models import resolve
from holdfast.training.optim.adamw8 import METHOD, AdamW8, state_bytes

built = pytest.mark.skipif(not native.usable(), reason=f"native kernels: {native._open()[1]}")
PATHS = ["off", *native.usable()]
MAPS = pytest.mark.parametrize("form", [SIGNED, UNSIGNED], ids=lambda form: form.name)
SHAPES = [(1,), (300,), (5, 7), (256, 384), (257, 129)]


def _parameter(shape, dtype=torch.float32) -> torch.nn.Parameter:
    g = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype))


def _gradients(shape, dtype, steps: int = 3) -> list[torch.Tensor]:
    """Gradients over six decades; the second step has a stretch of zeros, the third is all zero."""
    g = torch.Generator().manual_seed(1)
    decades = [10 ** (6 * torch.rand(shape, generator=g) - 5) for _ in range(steps)]
    out = [(torch.randn(shape, generator=g) * d).to(dtype) for d in decades]
    out[1].view(-1)[:200] = 0
    out[2].zero_()
    return out


def _run(shape, path: str, dtype=torch.float32) -> tuple[torch.Tensor, dict]:
    p = _parameter(shape, dtype)
    optimizer = AdamW8([p], lr=1e-2, min_numel=1)
    with native.force(path):
        for grad in _gradients(shape, dtype):
            p.grad = grad
            optimizer.step()
    return p.detach(), optimizer.state[p]


@MAPS
def test_arithmetic_gives_the_levels_of_the_map(form):
    levels = form.decode(torch.arange(256, dtype=torch.uint8), torch.ones(1))
    torch.testing.assert_close(levels, maps.table(form.name), rtol=1.2e-7, atol=0)
    top, bottom = form.numerators()
    assert [t / b for t, b in zip(top, bottom, strict=True)] == pytest.approx(
        maps.levels(form.name)
    )


@MAPS
def test_encoding_takes_the_nearest_level(form):
    g = torch.Generator().manual_seed(0)
    x = 10 ** (8 * torch.rand(1 << 18, generator=g) - 8)
    if form.signed:
        x *= torch.randn(len(x), generator=g).sign()
    x[::256] = 1
    code = form.encode(x, largest(x, 256)).int()
    want = torch.bucketize(x, maps.midpoints(form.name)).int()
    if not form.signed:
        want = want.clamp_min(1)  # a positive number is never written as zero
    # Rounding may differ for numbers within 1e-7 of a midpoint.
    assert (code - want).abs().max() <= 1 and (code != want).double().mean() < 2e-5


@MAPS
def test_encoding_what_was_decoded_changes_nothing(form):
    code = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(form.encode(form.decode(code, torch.ones(1)), torch.ones(1)), code)


@pytest.mark.parametrize("path", PATHS)
def test_equals_numpy(path):
    """Blocks of 256 by tables, where the fast paths compute levels and codes."""
    f, shape = np.float32, (48, 129)
    signed, unsigned = (np.array(maps.levels(form.name), f) for form in (SIGNED, UNSIGNED))
    p, n = _parameter(shape).detach().numpy().ravel(), 48 * 129
    block = np.arange(n) // 256
    m = v = m_scale = v_scale = np.zeros(n, f)
    for step, grad in enumerate(_gradients(shape, torch.float32), start=1):
        g = grad.numpy().ravel()
        m = m * m_scale * f(0.9) + f(1 - 0.9) * g
        v = v * v_scale * f(0.999) + f(1 - 0.999) * (g * g)
        size, root = f(1e-2 / (1 - 0.9**step)), f(1 / (1 - 0.999**step) ** 0.5)
        p = p * f(1 - 1e-4) + (-size * m) / (np.sqrt(v) * root + f(1e-8))
        m_scale = np.array([np.abs(m[block == b]).max() for b in range(block[-1] + 1)])[block]
        v_scale = np.array([v[block == b].max() for b in range(block[-1] + 1)])[block]
        ratio = [np.divide(x, s, out=np.zeros(n, f), where=s > 0) for x, s in
                 ((m, m_scale), (v, v_scale))]  # fmt: skip
        m_code = np.abs(ratio[0][:, None].astype(np.float64) - signed).argmin(1)
        v_code = np.abs(ratio[1][:, None].astype(np.float64) - unsigned).argmin(1)
        v_code = np.maximum(v_code, v > 0)
        m, v = signed[m_code], unsigned[v_code]
    ours, state = _run(shape, path)
    for name, want in (("m_code", m_code), ("v_code", v_code)):
        apart = np.abs(state[name].numpy().astype(int) - want)
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
    np.testing.assert_allclose(ours.numpy().ravel(), p, rtol=1e-4, atol=1e-5)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_native_variant_equals_torch_bitwise(shape, dtype):
    want_p, want = _run(shape, "off", dtype)
    for variant in native.usable():
        p, state = _run(shape, variant, dtype)
        assert torch.equal(p, want_p), variant
        assert all(torch.equal(state[k], want[k]) for k in want), variant


@built
def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(_run((257, 512), native.usable()[-1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])


def test_bytes_by_hand():
    # 98,304 elements in 384 blocks: a byte for m and for v, two scales a block, the step.
    assert state_bytes((256, 384), torch.bfloat16) == 2 * 98_304 + 2 * 4 * 384 + 4
    assert state_bytes((4097,), torch.float32) == 2 * 4097 + 2 * 4 * 17 + 4
    assert state_bytes((64, 64), torch.bfloat16) == 8 * 4096 + 4


@pytest.mark.parametrize("path", PATHS)
def test_meter_counts_the_formula_and_scratch_is_bounded(path):
    model = torch.nn.ParameterList([torch.zeros(256, 1024), torch.zeros(100)])
    for p in model:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = AdamW8(model.parameters())
    with native.force(path):
        optimizer.step()
        with Meter(model, optimizer) as logical:
            optimizer.step()
        with Meter(model, optimizer, backend="allocator") as allocator:
            optimizer.step()
    kept = sum(state_bytes(p.shape, p.dtype) for p in model)
    assert logical.at_peak["optimizer"] == kept
    assert allocator.peak - allocator.base <= (4 << 20 if path == "off" else 4096)


@pytest.mark.parametrize("path", PATHS)
def test_small_second_moments_do_not_vanish(path):
    p = torch.nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.full_like(p, 1e-6)
    p.grad[:, 0] = 1.0
    optimizer = AdamW8([p], lr=1e-3, weight_decay=0.0)
    with native.force(path):
        for _ in range(2):
            optimizer.step()
    _, v = optimizer.moments(p)
    assert v.min() > 0
    # Adam's own steps are of size lr; without the smallest level they would be many times that.
    assert p.abs().max() <= 2.1e-3


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_block(path):
    p = _parameter((64, 256))
    p.grad = torch.ones_like(p)
    p.grad[5, 7] = torch.nan
    optimizer = AdamW8([p])
    with native.force(path):
        for _ in range(2):
            optimizer.step()
            p.grad[5, 7] = 1.0
    wrong = p.isnan()
    assert wrong[5].all() and wrong.sum() == 256


def test_new_states_decode_to_zero():
    p = _parameter((64, 128))
    p.grad = torch.zeros_like(p)
    optimizer = AdamW8([p], weight_decay=0.0)
    start = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, start)
    assert not any(t.any() for t in optimizer.moments(p))


def test_fake_tensors_make_the_same_states():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(64, 128))
        optimizer = METHOD.apply([("p", p)], 1e-3)
        p.grad = torch.empty_like(p)
        for _ in range(2):
            optimizer.step()
        kept = sum(t.nbytes for t in optimizer.state[p].values())
    assert kept == state_bytes((64, 128), torch.float32)


def test_operator_is_well_formed():
    p, state = _run((64, 128), "off")
    states = (state["m_code"], state["m_scale"], state["v_code"], state["v_scale"])
    arguments = (p, torch.ones_like(p), *states, state["step"], 1e-3, 0.9, 0.999, 1e-8, 0.01)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.holdfast.adamw8_.default, arguments, test_utils=tests)


def test_plan_predicts_to_the_byte():
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    plan = fit(
        config, "1GiB", allow="lossy", sequence=32, hardware="cpu-2core", methods=("adamw8",)
    )
    source = resolve(config)
    model, optimizer = plan.apply(source.build("cpu"))
    batch = source.example_inputs(1, 32, "cpu")
    for _ in range(2):
        with Meter(model, optimizer, inputs=batch) as meter:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert meter.peak == plan.predicted.peak("device")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps=0.0 must be > 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        AdamW8([_parameter((4,))], **options)
