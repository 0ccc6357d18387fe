"""LeMo: layers train on informative blocks of tokens alone."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from holdfast import attach
from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, PlanFile
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.plan import Plan
from holdfast.training.data import DataSource
from holdfast.training.run import Run, Settings
from holdfast.training.saved import saved_bytes
from holdfast.training.saved.block_scores import Predictor, column_means, pair_scores
from holdfast.training.saved.lemo import (
    METHOD,
    LeMo,
    decoder_blocks,
    new_predictors,
    segmented_cross_entropy,
)
from holdfast.training.step import recompute

SMALL = dict(hidden_size=32, num_attention_heads=4)
N, BLOCK = 64, 8


def llama(depth=2, **config):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": depth, "intermediate_size": 48, "vocab_size": 64, **SMALL}
    options = {"num_key_value_heads": 2, "use_cache": False, **sizes, **config}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**options)).train()


def gpt2():
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=N, **drops)
    return hf.GPT2LMHeadModel(config).train()


def opt():
    torch.manual_seed(0)
    config = hf.OPTConfig(
        **SMALL, num_hidden_layers=2, ffn_dim=64, vocab_size=64, max_position_embeddings=N,
        word_embed_proj_dim=32, dropout=0.0,
    )  # fmt: skip
    return hf.OPTForCausalLM(config).train()


MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}


def tokens(rows=2, n=N, seed=1):
    return torch.randint(3, 64, (rows, n), generator=torch.Generator().manual_seed(seed))


def fixed(*rows):
    """A predictor that scores the listed blocks of each row highest, in this order."""

    def score(x, block):
        scores = torch.zeros(len(x), x.shape[1] // block)
        for row, best in enumerate(rows):
            for rank, i in enumerate(best):
                scores[row, i] = len(best) - rank
        return scores

    return score


def grads_of(model, ids, **inputs):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_with_nothing_dropped_it_is_the_plain_model(name, padded):
    model = MODELS[name]()
    ids = tokens()
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, -5:] = 0
    want, want_grads = grads_of(model, ids, **inputs)
    lemo = LeMo(model, block=BLOCK)
    lemo.thresholds = [-torch.inf] * 2
    got, got_grads = grads_of(model, ids, **inputs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    lemo.remove()
    assert torch.equal(grads_of(model, ids, **inputs)[0], want)


@pytest.mark.parametrize("name", MODELS)
def test_kept_tokens_keep_their_positions_and_see_only_kept_ones(name):
    model = MODELS[name]()
    ids = tokens()
    keeps = ([1, 4, 6, 7], [0, 2, 3, 5])
    LeMo(model, block=BLOCK, keep=0.5, predictors=[fixed(*keeps)] * 2)
    got = model.base_model(ids).last_hidden_state
    # The same by masking: dropped keys are invisible, dropped queries pass through.
    plain = MODELS[name]()
    here = torch.zeros(2, N // BLOCK, dtype=torch.bool)
    for row, blocks in enumerate(keeps):
        here[row, blocks] = True
    here = here.repeat_interleave(BLOCK, 1)
    mask = (here[:, None, None, :] & here[:, None, :, None]) & torch.ones(N, N).tril().bool()
    mask = mask | torch.eye(N, dtype=torch.bool)

    def masked(forward, x, *args, **kwargs):
        if args:  # GPT-2: cache, mask, encoder states
            args = (None, mask, *args[2:])
        else:
            kwargs["attention_mask"] = mask
        return torch.where(here[:, :, None], forward(x, *args, **kwargs), x)

    for layer in decoder_blocks(plain):
        attach.wrap(layer, masked)
    torch.testing.assert_close(got, plain.base_model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_dropped_tokens_are_neither_computed_nor_saved():
    head, rows = 8, 2
    ids = tokens(rows)

    def per_layer(n, keep=None):
        kept = {}
        for depth in (1, 2):
            model = llama(depth).model
            if keep is not None:
                LeMo(model, block=BLOCK, keep=keep, predictors=[fixed([0], [1])] * depth)
            seen = []
            model.layers[0].self_attn.q_proj.register_forward_pre_hook(
                lambda m, a, seen=seen: seen.append(a[0].shape[1])
            )
            part = ids[:, :n]
            kept[depth] = saved_bytes(lambda m=model, p=part: m(p).last_hidden_state, model, [ids])
            assert seen == [n if keep is None else round(keep * n)]
        return kept[2] - kept[1]

    for keep in (0.25, 0.5, 0.75):
        left = round(keep * N)
        # Beside the layer's activations at fewer tokens: positions, and cosines and sines at them.
        extra = 8 * rows * left + 2 * 4 * rows * left * head
        assert per_layer(N, keep) == per_layer(left) + extra


def test_every_label_counts():
    model = llama()
    ids = tokens()
    LeMo(model, block=BLOCK, keep=0.25, predictors=[fixed([0, 1], [2, 3])] * 2)
    out = model(input_ids=ids, labels=ids)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)


def test_evaluation_is_plain_and_short_inputs_too():
    plain, model = llama(), llama()
    LeMo(model, block=BLOCK, keep=0.25)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids[:, : BLOCK - 1]).logits, plain(ids[:, : BLOCK - 1]).logits)
    model.eval()
    assert torch.equal(model(ids).logits, plain.eval()(ids).logits)


def test_all_dropped_keeps_the_last_and_a_ragged_tail_always_stays():
    lemo = LeMo(llama(), block=4)
    lemo.thresholds = [torch.inf, 1.0]
    scores = torch.tensor([[0.5, 2.0, 1.5], [3.0, 0.2, 0.9]])
    assert lemo.choose(scores, 12, 0).tolist() == [[8, 9, 10, 11]] * 2
    assert lemo.choose(scores, 14, 0).tolist() == [[12, 13]] * 2
    # Row 0 has two blocks above the threshold, row 1 one; it keeps its second best as well.
    assert lemo.choose(scores, 13, 1).tolist() == [
        [4, 5, 6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 8, 9, 10, 11, 12],
    ]
    lemo.keep = 0.1
    assert lemo.choose(scores, 12, 0).tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_pair_scores_equal_the_definition(kv_heads):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 14, 3), torch.randn(2, kv_heads, 14, 3)
    got = pair_scores(q, k, 4)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                cells = [
                    sum(max(float(q[b, h, r] @ k[b, h * kv_heads // 4, c]), 0) for h in range(4))
                    / 4
                    for r in range(4 * i, 4 * i + 4)
                    for c in range(4 * j, 4 * j + 4)
                    if c <= r
                ]
                assert got[b, i, j] == pytest.approx(max(cells, default=0), abs=1e-5)
    assert torch.equal(column_means(torch.ones(1, 3, 3).tril()), torch.ones(1, 3))


def test_thresholds_move_along_central_differences():
    lemo = LeMo(llama(), block=BLOCK)
    seen = []

    def quality():
        seen.append(list(lemo.thresholds))
        return 3 * lemo.thresholds[0] - lemo.thresholds[1] ** 2

    lemo.refine(quality, rate=0.5, step=0.1)
    assert lemo.thresholds == pytest.approx([2.5, 0.0])
    assert len(seen) == 4 and seen[0] == pytest.approx([1.1, 1.0])
    with pytest.raises(UsageError, match="need keep=None"):
        LeMo(llama(), keep=0.5).refine(quality)


def test_refinement_drops_tokens_without_gradients():
    model = llama()
    lemo = LeMo(model, block=BLOCK)
    lengths = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: lengths.append(a[0].shape[1]))

    @torch.no_grad()
    def quality():
        return -model(input_ids=tokens(), labels=tokens()).loss.item()

    lemo.refine(quality)
    # Exact scores run a layer in full first.
    assert N in lengths and min(lengths) < N
    assert not any(layer.training is False for layer in model.modules())


def test_segmented_cross_entropy_equals_the_full_one():
    torch.manual_seed(0)
    head = nn.Linear(16, 48)
    h = torch.randn(2, 32, 16, requires_grad=True)
    labels = torch.randint(48, (2, 32))
    labels[0, :5] = -100
    want = F.cross_entropy(head(h).flatten(0, 1), labels.flatten())
    every = (h, head.weight, head.bias)
    want_grads = torch.autograd.grad(want, every)
    for segments in (1, 3, 4, 64):
        got = segmented_cross_entropy(h, head, labels, segments)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        for a, b in zip(torch.autograd.grad(got, every), want_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_logits_of_n_segments_take_an_nth():
    head = nn.Linear(16, 1024, bias=False).requires_grad_(False)
    h = torch.randn(1, 256, 16, requires_grad=True)
    labels = torch.randint(1024, (1, 256))

    def peak(segments):
        def step():
            segmented_cross_entropy(h, head, labels, segments).backward()
            h.grad = None

        step()
        with Meter(head, inputs=[h, labels]) as meter:
            step()
        return meter.peak

    # A constant and a part that is proportional to the segment.
    whole, half, quarter = map(peak, (1, 2, 4))
    assert whole - half == 2 * (half - quarter) >= 128 * 1024 * 4


def test_predictors_find_what_exact_scores_say():
    torch.manual_seed(0)
    model = llama(num_key_value_heads=4)
    with torch.no_grad():
        # Tokens below 16 are alike, and what is alike looks at each other.
        model.model.embed_tokens.weight[:16] *= 0.05
        model.model.embed_tokens.weight[:16, :4] += 3.0
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    generator = torch.Generator().manual_seed(3)

    def batch():
        order = torch.rand(4, N // BLOCK, 1, generator=generator).argsort(1)
        loud = order < N // BLOCK // 2
        low = torch.randint(16, (4, N // BLOCK, BLOCK), generator=generator)
        high = torch.randint(16, 19, (4, N // BLOCK, BLOCK), generator=generator)
        return {"input_ids": torch.where(loud, low, high).flatten(1)}

    predictors = new_predictors(model, rank=8)
    keys = set(model.state_dict())
    lemo = LeMo(model, block=BLOCK, keep=0.5, predictors=predictors)
    batches = [batch() for _ in range(8)]
    lemo.fit(batches, rounds=16)
    assert set(model.state_dict()) == keys
    exact, guess = [], []

    def see(layer, x, pairs):
        exact.append(column_means(pairs))
        guess.append(predictors[layer](x, BLOCK))

    for _ in range(4):
        lemo.exact(batch(), see)
    both = torch.stack([torch.cat(exact).flatten(), torch.cat(guess).flatten()])
    assert torch.corrcoef(both)[0, 1] >= 0.9
    twice = []
    for _ in range(2):
        lemo.fit(batches[:2], rounds=2)
        twice.append(copy.deepcopy(dict(predictors[1].named_buffers())))
    assert all(torch.equal(t, twice[1][n]) for n, t in twice[0].items())


def test_a_predictor_has_low_rank_after_pruning():
    predictor = new_predictors(llama(), rank=5)[0]
    d, r = 32, 5
    assert sum(t.numel() for t in predictor.buffers()) == 2 * (d * r + 2 * r * r)
    assert not list(predictor.parameters())


def test_recomputed_blocks_choose_the_same_tokens():
    model = llama()
    ids = tokens()
    LeMo(model, block=BLOCK, keep=0.5)
    want, want_grads = grads_of(model, ids)
    for layer in model.model.layers:
        recompute(layer)
    got, got_grads = grads_of(model, ids)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, want_grads, strict=True))


def test_half_precision_caches_and_copies():
    model = llama().bfloat16()
    model.config.use_cache = True
    LeMo(model, block=BLOCK, keep=0.5, predictors=new_predictors(model, rank=4))
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == 0
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.__dict__["_holdfast_lemo"].blocks[0] is twin.model.layers[0]


def test_bad_input():
    with pytest.raises(UsageError, match="block=0"):
        LeMo(llama(), block=0)
    with pytest.raises(UsageError, match=r"keep=1.5 is outside \(0, 1\]"):
        LeMo(llama(), keep=1.5)
    with pytest.raises(UsageError, match="1 predictors for 2 layers"):
        LeMo(llama(), predictors=[fixed([0])])
    model = llama()
    lemo = LeMo(model)
    with pytest.raises(UsageError, match="has a LeMo already"):
        LeMo(model)
    with pytest.raises(UsageError, match="predictors=new_predictors"):
        lemo.fit([{"input_ids": tokens()}])
    ready = LeMo(llama(), predictors=new_predictors(llama()))
    with pytest.raises(UsageError, match="rows of 12 tokens have no block of 64"):
        ready.fit([{"input_ids": tokens(n=12)}])
    ready.fit([{"input_ids": tokens()}], rounds=1)
    with pytest.raises(UsageError, match="0 stacks"):
        LeMo(nn.Linear(2, 2))
    eager = llama(attn_implementation="eager")
    LeMo(eager, block=BLOCK)
    with pytest.raises(UsageError, match="attn_implementation='sdpa'"):
        eager(tokens())
    head, h = nn.Linear(4, 5), torch.randn(2, 3, 4)
    with pytest.raises(UsageError, match="segments=7 is outside 1 to 6"):
        segmented_cross_entropy(h, head, torch.zeros(2, 3).long(), 7)
    with pytest.raises(UsageError, match="one label for each hidden state"):
        segmented_cross_entropy(h, head, torch.zeros(2, 2).long(), 1)


def test_what_cannot_be_gathered_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, bias):
            return self.linear(x) + bias.sum()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.body:
                x = block(x, torch.ones(7))
            return x

    net = Net()
    LeMo(net, block=2, keep=0.5, predictors=[fixed([0], [0])] * 2)
    with pytest.raises(UsageError, match=r"shape \(7,\).*cannot gather"):
        net(torch.randn(2, 8, 4))


MODEL = {
    "model_type": "llama", "vocab_size": 64, "num_hidden_layers": 6, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("sequence", [192, 200])
def test_a_plan_predicts_the_bytes_that_are_measured(sequence):
    spec = Methods(saved=[{"lemo": {"keep": 0.5}}])
    source = resolve(MODEL)
    family = trace_family(
        lambda: source.build("meta", torch.float32),
        lambda: source.example_inputs(2, sequence, "cpu", torch.float32),
        lambda model: apply.prepare(model, spec),
        lambda model, inputs: loss_of(model(**inputs)),
        {"keep": lambda block: None},
        lambda flops, moved, dtype: 0.0,
    )
    assert all(len(stack.kept) == 3 < stack.depth for stack in family.stacks)

    def make(parameters):
        return apply.make_optimizer([(str(i), p) for i, p in enumerate(parameters)], spec, 1e-3, 0)

    costs = UpdateCosts(make, lambda flops, moved, dtype: 0.0)
    composer = Composer(family, Life(False, 1), costs)
    predicted = composer.ledger(composer.uniform("keep"))

    model = apply.prepare(source.build("cpu", torch.float32), spec)
    batch = source.example_inputs(2, sequence, "cpu", torch.float32)
    apply.calibrate(model, [batch], spec)
    assert isinstance(model.model.layers[0].lemo_predictor, Predictor)
    assert model.model.layers[0].lemo_predictor.q0.any()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = apply.make_optimizer(named, spec, 1e-3, 0.0)

    def step():
        loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(model, optimizer, inputs=batch) as meter:
        step()
    assert predicted.peak() == meter.peak
    assert predicted.at_peak("device") == meter.at_peak


def test_a_plan_refuses_what_it_cannot_apply_to():
    assert "only causal" in METHOD.applies(llama().model)
    assert "scaled_dot_product" in METHOD.applies(llama(attn_implementation="eager"))
    assert METHOD.applies(gpt2()) is None


def test_a_run_calibrates_trains_and_exports_the_plain_model(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(MODEL | {"vocab_size": 264, "num_hidden_layers": 2})
    )
    (tmp_path / "text.txt").write_text(" ".join(f"{i} squared is {i * i}." for i in range(60)))
    spec = PlanFile(
        model=str(tmp_path / "config.json"), task="pretrain", sequence=128,
        budget={"device": 2**30}, methods=Methods(saved=[{"lemo": {"keep": 0.5}}], loss_chunk=64),
    )  # fmt: skip
    settings = Settings(DataSource((str(tmp_path / "text.txt"),)), steps=2)
    run = Run(Plan(spec), settings, tmp_path / "out")
    assert run.run()["steps"] == 2
    assert run.model.model.layers[0].lemo_predictor.q0.any()
    again, info = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    ids = tokens(n=128)
    assert torch.equal(again.eval()(ids).logits, run.model.eval()(ids).logits)
