"""Lengthened encoders: what they gave before, what transformers' own classes give, and bytes."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BigBirdForMaskedLM,
    CamembertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    LongformerForMaskedLM,
    LongformerModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaForMaskedLM,
)

from holdfast.context.attention.clinical import copy_global, lengthen, to_stock
from holdfast.errors import UsageError
from holdfast.meter import Meter

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SMALL = {"window": 32, "block": 8}
FAMILIES = ("bert", "roberta")
ATTENTIONS = ("longformer", "bigbird")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(family, kind="MaskedLM", **more):
    options = SIZES | {"max_position_embeddings": 64} | more
    if family == "roberta":
        options |= {"max_position_embeddings": 66, "pad_token_id": 1, "eos_token_id": 2}
        config = RobertaConfig(**options, bos_token_id=0)
        model = {"MaskedLM": RobertaForMaskedLM, "Model": RobertaModel}[kind](config)
    else:
        config = BertConfig(**options)
        model = {"MaskedLM": BertForMaskedLM, "Model": BertModel}[kind](config)
    return sharpened(model).eval()


def sharpened(model, by=8.0):
    """Weights far from their initialisation, so that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(by)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stir(model):
    """As if trained: the projections of global tokens are no copies any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def padded(model, n):
    """Rows of n and n - 20 tokens, padded on the right; some tokens are global."""
    ids, mask = torch.randint(5, 50, (2, n)), torch.ones(2, n, dtype=torch.long)
    mask[1, n - 20 :] = 0
    ids[mask == 0] = model.config.pad_token_id
    marked = torch.zeros_like(ids)
    marked[0, [0, 40]] = 1
    marked[1, 3] = 1
    more = {}
    if model.lengthened.attention == "longformer":
        more["global_attention_mask"] = marked
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_within_the_window_give_what_they_gave(family, attention):
    model = make(family)
    before = copy.deepcopy(model)
    assert lengthen(model, attention, 512, **SMALL) is model
    first = 2 if family == "roberta" else 0
    assert model.config.max_position_embeddings == 512 + first
    # 16 on either side; with blocks of 8, up to 11 blocks are attended to in full.
    n = 17 if attention == "longformer" else 64
    ids = torch.randint(5, 50, (2, n))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, atol=1e-5, rtol=0)
        if attention == "longformer":
            mark = torch.zeros_like(ids).index_fill(1, torch.tensor([0, 5]), 1)
            found = model(ids, global_attention_mask=mark).logits
            torch.testing.assert_close(found, before(ids).logits, atol=1e-5, rtol=0)
        far = model(ids.repeat(1, 6)).logits[:, :n]
    assert not torch.allclose(far, before(ids).logits, atol=1e-2)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [60, 301, 512])
def test_stock_classes_give_the_same(family, attention, n):
    model = stir(lengthen(make(family), attention, 512, **SMALL))
    stock = to_stock(model)
    inputs = padded(model, n)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, want = model(**inputs).logits[real], stock(**inputs).logits[real]
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
        del inputs["attention_mask"]
        inputs["input_ids"] = torch.randint(5, 50, (2, n))
        torch.testing.assert_close(
            model(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", [XLMRobertaForMaskedLM, CamembertForMaskedLM])
def test_relatives_of_roberta(kind):
    config = kind.config_class(**SIZES, max_position_embeddings=66, pad_token_id=1)
    model = lengthen(sharpened(kind(config)).eval(), "longformer", 256, window=32)
    inputs = padded(model, 200)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = to_stock(model)(**inputs).logits[real]
        torch.testing.assert_close(model(**inputs).logits[real], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_stock_longformer(family):
    model = stir(lengthen(make(family), "longformer", 256, window=32))
    stock = to_stock(model)
    inputs = padded(model, 200)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for m in (model, stock):
        m(**inputs, labels=labels).loss.backward()
    theirs = dict(stock.named_parameters())
    compared = 0
    for name, parameter in model.base_model.encoder.named_parameters():
        want = theirs[f"longformer.encoder.{name}"].grad
        scale = want.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(parameter.grad / scale, want / scale, atol=1e-4, rtol=0)
        compared += "_global" in name
    assert compared == 2 * 6


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_opens_with_auto_model(tmp_path, family, attention):
    model = stir(lengthen(make(family), attention, 512, **SMALL))
    to_stock(model).save_pretrained(tmp_path)
    opened, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    wanted = LongformerForMaskedLM if attention == "longformer" else BigBirdForMaskedLM
    assert type(opened) is wanted
    inputs = padded(model, 400)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = opened.eval()(**inputs).logits[real]
        torch.testing.assert_close(found, model(**inputs).logits[real], atol=1e-5, rtol=0)
        body = AutoModel.from_pretrained(tmp_path).eval()(**inputs).last_hidden_state
        want = model.base_model(**inputs).last_hidden_state
        torch.testing.assert_close(body[real], want[real], atol=1e-5, rtol=0)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pooler_goes_along(family):
    for attention in ATTENTIONS:
        model = stir(lengthen(make(family, "Model"), attention, 512, **SMALL))
        stock = to_stock(model)
        ids = torch.randint(5, 50, (1, 300))
        with torch.no_grad():
            torch.testing.assert_close(
                model(ids).pooler_output, stock(ids).pooler_output, atol=1e-5, rtol=0
            )
    assert type(to_stock(lengthen(make(family, "Model"), "longformer", 512))) is LongformerModel


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_repeated_behind_roberta_s_offset(family):
    model = make(family)
    first = 2 if family == "roberta" else 0
    old = model.base_model.embeddings.position_embeddings.weight.detach().clone()
    lengthen(model, "longformer", 200, window=32)
    new = model.base_model.embeddings.position_embeddings
    assert new.weight.shape == (200 + first, 32) and new.weight.requires_grad
    assert torch.equal(new.weight[:first], old[:first])
    for position in (0, 63, 64, 127, 128, 199):
        assert torch.equal(new.weight[first + position], old[first + position % 64])
    assert new.padding_idx == (1 if family == "roberta" else None)
    # Longformer's table begins behind its padding row for either family.
    table = to_stock(model).longformer.embeddings.position_embeddings.weight
    offset = model.config.pad_token_id + 1
    assert len(table) == 200 + offset and torch.equal(table[offset:], new.weight[first:])


def test_global_projections_begin_as_copies_and_are_copied_again():
    model = lengthen(make("bert"), "longformer", 256, window=32)
    attention = model.bert.encoder.layer[1].attention.self

    def copied():
        pairs = (
            (attention.query_global, attention.query),
            (attention.value_global, attention.value),
        )
        return all(
            torch.equal(twin.weight, own.weight) and torch.equal(twin.bias, own.bias)
            for twin, own in pairs
        )

    assert copied()
    stir(model)
    assert not copied()
    copy_global(model)
    assert copied()
    copy_global(lengthen(make("bert"), "bigbird", 256))  # has none


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parameters_grow_by_the_formula(attention):
    model = make("roberta")
    before = sum(p.nbytes for p in model.parameters())
    lengthen(model, attention, 256, **SMALL)
    projections = 2 * 3 * (32 * 32 + 32) * 4 if attention == "longformer" else 0
    grown = sum(p.nbytes for p in model.parameters()) - before
    assert grown == (256 - 64) * 32 * 4 + projections


def test_any_head_trains_in_process():
    config = BertConfig(**SIZES, max_position_embeddings=64, num_labels=3)
    model = lengthen(BertForSequenceClassification(config), "longformer", 256, window=32)
    ids = torch.randint(5, 50, (2, 200))
    mark = torch.zeros_like(ids).index_fill(1, torch.tensor([0]), 1)
    model(ids, global_attention_mask=mark, labels=torch.tensor([0, 2])).loss.backward()
    assert model.bert.encoder.layer[0].attention.self.key_global.weight.grad.abs().max() > 0
    with pytest.raises(UsageError, match="BertForSequenceClassification has a head that longf"):
        to_stock(model)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_measured_peak_doubles_with_the_length(attention):
    model = make("bert", "Model", num_hidden_layers=1)
    lengthen(model, attention, 8192, window=64, block=32)

    def peak(m, n):
        ids = torch.randint(5, 50, (1, n))

        def step():
            m(ids).last_hidden_state.sum().backward()
            m.zero_grad()

        step()
        with Meter(m, inputs=ids) as meter:
            step()
        return meter.peak - meter.base

    peaks = [peak(model, n) for n in (1024, 2048, 4096, 8192)]
    for one, two in pairwise(peaks):
        assert 2 * 0.85 < two / one < 2 * 1.15
    # transformers' own classes hold a mask or probabilities of n x n.
    stock = to_stock(model)
    one, two = peak(stock, 1024), peak(stock, 2048)
    assert two > 2.3 * one and two > 2 * peaks[1]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_activations_that_are_kept_follow_the_formula(attention):
    model = make("bert", "Model")
    lengthen(model, attention, 1024, **SMALL)
    attend = model.encoder.layer[0].attention.self
    states = torch.randn(2, 512, 32, requires_grad=True)
    for parameter in attend.parameters():
        parameter.requires_grad_(False)
    saved = {}

    def keep(x):
        saved[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, _ = attend(states)
    weights = {p.untyped_storage()._cdata for p in attend.parameters()}
    held = sum(s.nbytes() for key, s in saved.items() if key not in weights)
    # q, k, v, the output and a log-sum-exp per query and head.
    assert held == 4 * (4 * 2 * 512 * 32 + 2 * 2 * 512)
    assert out.requires_grad


def test_attention_dropout_is_honoured_in_training():
    for attention in ATTENTIONS:
        model = lengthen(make("bert"), attention, 256, **SMALL)
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.5
        ids = torch.randint(5, 50, (1, 200))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
            one, two = (model.train()(ids).logits for _ in range(2))
        assert not torch.allclose(one, two, atol=1e-3)


def test_what_cannot_be_lengthened_is_named():
    distil = DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    )
    with pytest.raises(UsageError, match=r"DistilBertModel cannot be lengthened.*'distilbert'"):
        lengthen(distil)
    with pytest.raises(UsageError, match="unknown attention 'performer'; nearest known"):
        lengthen(make("bert"), "performer")
    with pytest.raises(UsageError, match="max_len=64 is no more than the 64 positions of Roberta"):
        lengthen(make("roberta"), max_len=64)
    with pytest.raises(UsageError, match="window=33 cannot lie evenly"):
        lengthen(make("bert"), window=33)
    model = lengthen(make("bert"))
    with pytest.raises(UsageError, match="BertForMaskedLM was lengthened to 4096 already"):
        lengthen(model)
    with pytest.raises(UsageError, match="BertForMaskedLM is a decoder"):
        lengthen(make("bert", is_decoder=True))
    relative = make("bert")
    relative.config.position_embedding_type = "relative_key"
    with pytest.raises(UsageError, match="position_embedding_type='relative_key': without a table"):
        lengthen(relative)
    silu = lengthen(make("bert", hidden_act="silu"))
    with pytest.raises(
        UsageError, match=r"BertForMaskedLM has hidden_act='silu'.*base model alone"
    ):
        to_stock(silu)
    model = lengthen(make("bert"), max_len=256, window=32)
    given = torch.ones(1, 1, 80, 80, dtype=torch.bool).tril()
    with pytest.raises(UsageError, match="BertSelfAttention hides more than padding"):
        model(torch.randint(5, 50, (1, 80)), attention_mask=given)
