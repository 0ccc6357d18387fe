from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from holdfast.errors import UsageError
from holdfast.longterm.longconv import (
    Filter,
    LongMixer,
    fft_size,
    long_convolve,
    long_convolve_ref,
    mixer_parameters,
)
from holdfast.longterm.m2bert import BlockLinear, M2Bert, M2Config, M2Encoder
from holdfast.meter import Meter

TINY = M2Config(vocabulary=60, width=16, layers=2, inner=32, blocks=4, length=64, filter_width=8)
WORDS = [f"w{i}" for i in range(60)]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def model(config: M2Config = TINY, seed: int = 0) -> M2Bert:
    """Untrained, but with layers that do something: new ones add zero."""
    torch.manual_seed(seed)
    made = M2Bert(config)
    for layer in made.layers:
        torch.nn.init.normal_(layer.mixer.leave.weight, std=0.3)
        torch.nn.init.normal_(layer.out.weight, std=0.3)
    return made


@pytest.fixture
def encoder():
    return M2Encoder(model(), tokenizer())


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 127])
@pytest.mark.parametrize("both", [True, False])
def test_long_convolution_equals_direct(length, both):
    torch.manual_seed(length)
    u = torch.randn(2, 3, length, requires_grad=True)
    filters = [torch.randn(3, length, requires_grad=True) for _ in range(1 + both)]
    got, want = long_convolve(u, *filters), long_convolve_ref(u, *filters)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    up = torch.randn_like(got)
    inputs = [u, *filters]
    for g, w in zip(
        torch.autograd.grad(got, inputs, up), torch.autograd.grad(want, inputs, up), strict=True
    ):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=0)


def test_convolution_by_hand():
    u = torch.tensor([[[1.0, 0, 0, 10]]])
    ahead, behind = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[5.0, 6, 7, 8]])
    # Nothing of the last token wraps to the front, and the token itself belongs to `ahead` alone.
    assert long_convolve(u, ahead).round(decimals=4).tolist() == [[[1, 2, 3, 14]]]
    assert long_convolve(u, ahead, behind).round(decimals=4).tolist() == [[[71, 62, 53, 14]]]


def test_convolution_keeps_half_precision():
    u = torch.randn(1, 2, 33, dtype=torch.bfloat16)
    ahead = torch.randn(2, 33)
    got = long_convolve(u, ahead)
    assert got.dtype == torch.bfloat16
    want = long_convolve_ref(u.float(), ahead)
    torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.01)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 100, 2048, 2049, 32_768])
def test_fft_size_never_wraps_and_stays_close(length):
    assert 2 * length <= fft_size(length) <= max(2 * length + 1, 2.25 * length)


def test_block_diagonal_equals_dense():
    torch.manual_seed(0)
    layer = BlockLinear(12, 20, 4)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 12)
    dense = torch.block_diag(*layer.weight)
    assert dense.shape == (20, 12)
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias, atol=1e-6, rtol=0)


def test_mixer_equals_its_formula():
    torch.manual_seed(0)
    mixer = LongMixer(6, 20, 8)
    u = torch.randn(2, 13, 6)
    wide = (u @ mixer.enter.weight.T + mixer.enter.bias).mT
    padded = torch.nn.functional.pad(wide, (2, 0))
    taps = mixer.short.weight[:, 0]
    wide = sum(taps[:, i, None] * padded[..., i : i + 13] for i in range(3))
    first, second, value = (wide + mixer.short.bias[:, None]).chunk(3, 1)

    def conv(module, x):
        return long_convolve_ref(x, module.ahead(13), module.behind(13)) + module.skip[:, None] * x

    mixed = conv(mixer.gated, value * first) * second + conv(mixer.beside, u.mT)
    torch.testing.assert_close(mixer(u), mixer.leave(mixed.mT), atol=1e-4, rtol=0)


def test_causal_mixer_sees_no_future_and_the_other_does():
    torch.manual_seed(0)
    u = torch.randn(1, 24, 8)
    changed = u.clone()
    changed[:, 12:] += 1
    for causal in (True, False):
        mixer = LongMixer(8, 24, 8, causal=causal)
        assert sum(p.numel() for p in mixer.parameters()) == mixer_parameters(8, 8, causal=causal)
        moved = (mixer(u) - mixer(changed))[:, :12].abs().max()
        assert (moved < 1e-5) == causal


def test_filter_stretches_and_stays_fp32():
    torch.manual_seed(0)
    short = Filter(4, 32, 8)
    long = Filter(4, 64, 8)
    long.load_state_dict(short.state_dict())
    # Twice the length: the same function at half the lag, at 1/sqrt(2) of the height.
    torch.testing.assert_close(long(64)[:, ::2] * 2**0.5, short(32), atol=1e-5, rtol=0)
    assert short.bfloat16()(32).dtype == torch.float32


@pytest.mark.parametrize("config", [TINY, M2Config()])
def test_parameters_are_exact(config):
    with torch.device("meta"):
        made = M2Bert(config)
    assert sum(p.numel() for p in made.parameters()) == config.parameters()


def test_the_base_model_has_80_million_parameters():
    assert 79e6 < M2Config().parameters() < 82e6


def test_saved_bytes_grow_with_the_length_not_its_square():
    held = []
    for length in (128, 256, 512):
        made = model(M2Config(60, 16, 2, 32, 4, 512, 8))
        ids = torch.randint(60, (1, length))
        made.pool(ids).sum().backward()  # the first use of a kernel keeps frames alive
        made.zero_grad()
        with Meter(made, inputs=ids) as meter:
            made.pool(ids).sum().backward()
        held.append(meter.at_peak["activations"] + meter.at_peak["temporary"])
    assert all(1.8 < b / a <= 2.2 for a, b in pairwise(held)), held


def test_a_vector_does_not_depend_on_its_batch(encoder):
    texts = [" ".join(WORDS[:n]) for n in (3, 40, 11, 64)]
    together = encoder.encode(texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-5)


def test_order_and_late_tokens_count(encoder):
    words = WORDS[:50]
    late = encoder.encode([" ".join(words), " ".join([*words[:-1], WORDS[55]])])
    swapped = encoder.encode([" ".join(words), " ".join(words[::-1])])
    assert np.abs(late[0] - late[1]).max() > 1e-3 and np.abs(swapped[0] - swapped[1]).max() > 1e-3


def test_encoder_is_an_embedder(encoder):
    assert encoder.dim == 16
    vectors = encoder.encode(["w1 w2", "", "w3"])
    assert vectors.dtype == np.float32 and vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.encode([]).shape == (0, 16)
    query = encoder.encode_query("w1 w2")
    np.testing.assert_allclose(query.vector, vectors[0], atol=1e-5)
    (window,) = encoder.encode_in_context(["w1", "w2", "w3"], [1])
    np.testing.assert_allclose(window.window, encoder.encode(["w1\nw2\nw3"])[0], atol=1e-5)
    assert window.tokens is None


def test_encode_leaves_the_mode_as_it_was(encoder):
    encoder.model.train()
    encoder.encode(["w1"])
    assert encoder.model.training


def test_id_names_the_weights(encoder):
    before = encoder.id
    assert before.startswith("m2bert-") and encoder.id == before
    with torch.no_grad():
        encoder.model.words.weight.add_(1)
    assert encoder.id != before


def test_save_and_load(encoder, tmp_path):
    encoder.save(tmp_path / "made")
    opened = M2Encoder.load(tmp_path / "made")
    assert opened.id == encoder.id
    assert np.array_equal(opened.encode(["w4 w5"]), encoder.encode(["w4 w5"]))
    (tmp_path / "made" / "config.json").write_text('{"depth": 2}')
    with pytest.raises(UsageError, match=r"no sizes of an M2-BERT.*depth.*expected vocabulary"):
        M2Encoder.load(tmp_path / "made")
    with pytest.raises(UsageError, match=r"is missing; M2Encoder\.save writes"):
        M2Encoder.load(tmp_path)


def test_extended_repeats_places_and_reads_more():
    short = model()
    torch.nn.init.normal_(short.places.weight)
    longer = short.extended(130)
    assert longer.config.length == 130
    places = longer.places.weight
    assert torch.equal(places[64:128], places[:64]) and torch.equal(places[128:], places[:2])
    assert torch.equal(longer.layers[0].mixer.enter.weight, short.layers[0].mixer.enter.weight)
    assert longer(torch.zeros(1, 130, dtype=torch.long)).isfinite().all()
    with pytest.raises(UsageError, match="length=32 is shorter than the model's 64"):
        short.extended(32)


def test_more_than_the_maximum_is_refused(encoder):
    with pytest.raises(
        UsageError, match=r"65 tokens is longer than the model's 64.*extended\(65\)"
    ):
        encoder.model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(UsageError, match="65 tokens is longer"):
        encoder.encode(["w1 " * 65])
    with pytest.raises(UsageError, match="65 tokens are more than the 64"):
        LongMixer(8, 64, 8)(torch.zeros(1, 65, 8))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="blocks=4 does not divide width=18 and inner=32"):
        M2Config(width=18, inner=32)
    with pytest.raises(UsageError, match="layers=0 must be at least 1"):
        M2Config(layers=0)
    with pytest.raises(UsageError, match="60 tokens, the model 50"):
        M2Encoder(M2Bert(M2Config(50, 16, 1, 32, 4, 64, 8)), tokenizer())
