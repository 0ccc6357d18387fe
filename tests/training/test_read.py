"""READ: a GRU over depth beside a backbone that runs without gradients."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, PlanFile
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.plan import Plan
from holdfast.training.adapters import read
from holdfast.training.adapters.read import READ, _OverDepth
from holdfast.training.data import DataSource
from holdfast.training.run import Run, Settings
from holdfast.training.saved import saved_bytes

IDS = torch.arange(24).view(2, 12)
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)


def llama(depth=3, **config):
    torch.manual_seed(0)
    sizes = SMALL | {"num_hidden_layers": depth, "intermediate_size": 48, "vocab_size": 64}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, use_cache=False, **config))


def t5():
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2,
        num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def models():
    opt = hf.OPTConfig(
        **SMALL, ffn_dim=64, vocab_size=64, max_position_embeddings=32, word_embed_proj_dim=32,
        dropout=0.0,
    )  # fmt: skip
    gpt = hf.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = hf.BertConfig(**SMALL, **quiet, intermediate_size=64, vocab_size=64)
    vit = hf.ViTConfig(**SMALL, **quiet, intermediate_size=64, image_size=16, patch_size=4)
    ids = {"input_ids": IDS}
    return {
        "llama": (llama, ids),
        "gpt2": (lambda: hf.GPT2LMHeadModel(gpt), ids),
        "opt": (lambda: hf.OPTForCausalLM(opt), ids),
        "bert": (lambda: hf.BertForSequenceClassification(bert), ids),
        "vit": (
            lambda: hf.ViTForImageClassification(vit),
            {"pixel_values": torch.randn(2, 3, 16, 16)},
        ),
        "t5": (t5, ids | {"decoder_input_ids": IDS}),
    }


def side_parameters(side: READ) -> int:
    return sum(p.numel() for p in side.parameters())


def moved(side: READ) -> None:
    """Away from its start, at which the correction is zero."""
    for net in side.nets.values():
        if net.output is not None:
            nn.init.normal_(net.output.weight, std=0.3)


@pytest.mark.parametrize("layers", [1, 4])
def test_states_and_gradients_are_those_of_torch_gru(layers):
    torch.manual_seed(0)
    gru = nn.GRU(5, 3).double()
    norm = torch.rand(5, dtype=torch.float64).add_(0.5).requires_grad_()
    x = torch.randn(layers, 6, 5, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    got = _OverDepth.apply(x, start, norm, *weights)
    want = gru(x * norm, start.repeat_interleave(3, 0)[None])[0].mean(0)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(got)
    every = (start, norm, *weights)
    for a, b in zip(
        torch.autograd.grad(got, every, g), torch.autograd.grad(want, every, g), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", models())
def test_zero_output_is_the_backbone_bitwise_and_nothing_else_gets_a_gradient(name):
    build, inputs = models()[name]
    model = build().train()
    with torch.no_grad():  # with gradients, T5's attention takes another kernel
        before = model(**inputs).logits
    side = READ(model, hidden=8)
    assert torch.equal(model(**inputs).logits, before)
    moved(side)
    after = model(**inputs).logits
    assert not torch.equal(after, before)
    after.square().mean().backward()
    heads = {id(p) for p in model.parameters() if p.requires_grad} - {
        id(p) for p in side.parameters()
    }
    assert bool(heads) == (name in ("llama", "bert", "vit"))  # the others tie theirs
    for parameter_name, parameter in model.named_parameters():
        trains = parameter_name.startswith("read.") or id(parameter) in heads
        assert (parameter.grad is not None) == trains, parameter_name
    side.detach()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert all(p.requires_grad for p in model.parameters())


def test_saved_bytes_are_the_formula_and_independent_of_the_backbone():
    tokens, d, h = IDS.numel(), 32, 8
    for depth in (2, 5):
        model = llama(depth).model.train()
        side = READ(model, hidden=h)
        x = model.embed_tokens.weight  # a parameter, like the rest
        got = saved_bytes(lambda m=model: m(IDS).last_hidden_state, model, [IDS, x])
        # `start` is (B,h), zero.
        assert got == 4 * (depth * tokens * (d + h) + tokens * h + len(IDS) * h)
        assert side_parameters(side) == 3 * h * (d + h) + 6 * h + (h + 1) * d + d


def test_parameters_do_not_grow_with_depth():
    counts = {side_parameters(READ(llama(depth))) for depth in (4, 12)}
    assert len(counts) == 1


def test_a_trained_head_keeps_its_input():
    model = llama().train()
    READ(model, hidden=8)
    assert model.lm_head.weight.requires_grad
    tokens = IDS.numel()
    hidden = saved_bytes(lambda: model.model(IDS).last_hidden_state, model, [IDS])
    assert saved_bytes(lambda: model(IDS).logits, model, [IDS]) == hidden + 4 * tokens * 32


def test_the_decoder_reads_uncorrected_states_without_a_graph():
    model = t5().train()
    encoder = copy.deepcopy(model).eval()
    side = READ(model, hidden=8)
    moved(side)
    out = model(input_ids=IDS, labels=IDS)
    states = out.encoder_last_hidden_state
    assert states.grad_fn is None and not states.requires_grad
    torch.testing.assert_close(states, encoder.get_encoder()(IDS).last_hidden_state)
    out.loss.backward()
    for net in side.nets.values():
        assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "output" not in n)
    assert side.nets["encoder_block"].output is None


def test_padding_in_the_source_does_not_reach_the_decoder():
    model = t5().eval()
    moved(READ(model, hidden=8))
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    other = IDS.clone()
    other[:, 8:] = 7
    first, second = (
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=IDS).logits
        for ids in (IDS, other)
    )
    torch.testing.assert_close(first, second)


def test_generation_equals_teacher_forcing():
    model = llama().eval()
    model.config.use_cache = True
    moved(READ(model, hidden=8))
    model.generation_config.eos_token_id = None
    out = model.generate(IDS[:, 4:8], max_new_tokens=5, do_sample=False, pad_token_id=63)
    again = model(out).logits.argmax(-1)
    assert torch.equal(again[:, 3:-1], out[:, 4:])
    moved(READ(both := t5().eval(), hidden=8))
    assert both.generate(IDS, max_new_tokens=4, do_sample=False).shape[0] == 2
    with pytest.raises(UsageError, match="beam search"):
        both.generate(IDS, max_new_tokens=4, num_beams=2)


def test_only_chosen_layers_are_read():
    model = llama(4).train()
    READ(model.model, hidden=8, layers=[3, 1])
    got = saved_bytes(lambda: model.model(IDS).last_hidden_state, model, [IDS])
    assert got == 4 * (2 * IDS.numel() * 40 + IDS.numel() * 8 + len(IDS) * 8)


def test_save_and_load(tmp_path):
    model = llama().train()
    side = READ(model, hidden=8, layers=[0, 2])
    moved(side)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    path = side.save(tmp_path)
    assert path.name == "read.safetensors"
    again = llama().train()
    loaded = read.load(again, tmp_path)
    assert loaded.layers == [0, 2] and loaded.hidden == 8
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    other = llama(tie_word_embeddings=True)
    with pytest.raises(UsageError, match="differ in"):
        read.load(other, tmp_path)
    assert not hasattr(other, "read")
    with pytest.raises(UsageError, match="cannot be read"):
        read.load(llama(), tmp_path / "nowhere")


def test_half_precision_and_deep_copies():
    model = llama().bfloat16().train()
    side = READ(model, hidden=8)
    moved(side)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    nn.init.zeros_(twin.read.nets["model_layers"].output.weight)
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert {p.grad.dtype for p in side.parameters()} == {torch.bfloat16}


def test_nothing_outlives_a_step():
    model = llama().train()
    READ(model, hidden=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)

    def step():
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with Meter(model, optimizer, inputs=IDS) as meter:
        step()
    assert meter.end == meter.base


def test_bad_input():
    with pytest.raises(UsageError, match="hidden=0"):
        READ(llama(), hidden=0)
    with pytest.raises(UsageError, match=r"layers=\[5\] are not among the 3 blocks"):
        READ(llama(), layers=[5])
    model = llama()
    READ(model)
    with pytest.raises(UsageError, match="adapter already"):
        READ(model)
    with pytest.raises(UsageError, match="0 stacks"):
        READ(nn.Linear(2, 2))


MODEL = {
    "model_type": "llama", "vocab_size": 64, "num_hidden_layers": 6, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4,
}  # fmt: skip


def predicted(spec: Methods, batch=2, sequence=16):
    source = resolve(MODEL)
    family = trace_family(
        lambda: source.build("meta", torch.float32),
        lambda: source.example_inputs(batch, sequence, "cpu", torch.float32),
        lambda model: apply.prepare(model, spec),
        lambda model, inputs: loss_of(model(**inputs)),
        {"keep": lambda block: None},
        lambda flops, moved, dtype: 0.0,
    )

    def make(parameters):
        return apply.make_optimizer([(str(i), p) for i, p in enumerate(parameters)], spec, 1e-3, 0)

    costs = UpdateCosts(make, lambda flops, moved, dtype: 0.0)
    composer = Composer(family, Life(False, 1), costs)
    return composer.ledger(composer.uniform("keep"))


def test_a_plan_predicts_the_bytes_that_are_measured():
    spec = Methods(adapter={"read": {"hidden": 8}})
    source = resolve(MODEL)
    model = apply.prepare(source.build("cpu", torch.float32), spec)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = apply.make_optimizer(trained, spec, 1e-3, 0.0)
    batch = source.example_inputs(2, 16, "cpu", torch.float32)

    def step():
        loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(model, optimizer, inputs=batch) as meter:
        step()
    ledger = predicted(spec)
    assert ledger.peak() == meter.peak
    assert ledger.at_peak("device") == meter.at_peak


def test_a_plan_refuses_what_it_cannot_apply_to():
    assert "no config" in read.METHOD.applies(nn.Linear(2, 2))
    assert read.METHOD.applies(llama()) is None
    assert read.METHOD.applies(t5()) is None


def test_a_run_writes_a_file_that_loads_and_refuses_to_merge(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 264}))
    (tmp_path / "text.txt").write_text(" ".join(f"{i} squared is {i * i}." for i in range(60)))
    spec = PlanFile(
        model=str(tmp_path / "config.json"), task="pretrain", sequence=16,
        budget={"device": 2**30}, methods=Methods(adapter={"read": {"hidden": 8}}),
    )  # fmt: skip
    settings = Settings(DataSource((str(tmp_path / "text.txt"),)), steps=2)
    run = Run(Plan(spec), settings, tmp_path / "out")
    run.run()
    torch.manual_seed(spec.training.seed)
    again = resolve(spec.model).build("cpu", torch.float32).eval()
    read.load(again, tmp_path / "out")
    assert torch.equal(again(IDS).logits, run.model.eval()(IDS).logits)
    with pytest.raises(UsageError, match="leave --merge out"):
        Run(Plan(spec), replace(settings, merge=True), tmp_path / "merged")
