"""PPD: trees by hand and by brute force, tree attention against plain passes, greedy text."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from holdfast.checks import tinylm
from holdfast.context.attention import ppd
from holdfast.context.attention.ppd import PPD, RANKS, keep_rows, ppd_generate
from holdfast.context.attention.ppd_trees import (
    Inputs,
    Plan,
    Tree,
    _chain,
    accept,
    begins,
    fastest,
    plan,
)
from holdfast.errors import UsageError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Guesses at the first and the second depth, by rank.
TWO = ((0.5, 0.25), (0.4, 0.3))


def test_the_best_trees_by_hand():
    # Half of the guesses are right. With two inputs a chain and a candidate take turns; with three
    # the better half of the ends has a chain; with four every end has one.
    for size, accepted, shares in ((1, 1, (1, 0)), (2, 1.25, (1 / 2, 1 / 2)),
                                   (3, 4 / 3, (1 / 3, 2 / 3)), (4, 1.5, (0, 1))):  # fmt: skip
        found = plan(((0.5,),), size)
        assert found.accepted == pytest.approx(accepted, abs=1e-5)
        assert found.shares == pytest.approx(shares, abs=1e-5)
        assert found.size <= size
    # A prompt token of two copies is two inputs: three hold the chain or two candidates.
    assert plan(((0.5, 0.2),), 3, copies=2).accepted == pytest.approx(1 + 0.7 / 2, abs=1e-5)


def trees(depth, size, prompts):
    """All trees of candidates of two ranks with chains, of at most `size` inputs."""
    paths = [p for n in range(1, depth + 1) for p in itertools.product(range(2), repeat=n)]
    for count in range(size):
        for chosen in itertools.combinations(paths, count):
            nodes = ((), *chosen)
            if all(p[:-1] in nodes for p in chosen):
                for chains in itertools.product(range(prompts + 1), repeat=len(nodes)):
                    if len(nodes) + sum(chains) <= size:
                        yield Tree(nodes, chains)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_no_plan_is_much_better(size):
    options = [list(trees(state, size, 2)) for state in range(3)]
    rows = [[_chain([tree] * 3, TWO) for tree in trees] for trees in options]
    reward = [torch.stack([r[0] for r, _ in row]) for row in rows]
    move = [torch.stack([m[0] for _, m in row]) for row in rows]
    # Value iteration over all policies: the gain of the best one is what a step adds in the end.
    value = torch.zeros(3, dtype=torch.float64)
    for _ in range(400):
        before = value
        value = torch.stack([(reward[s] + move[s] @ before).max() for s in range(3)])
        value = (value + before) / 2  # without periods
    best = float((value - before)[0]) * 2
    found = plan(TWO, size).accepted
    assert 0.97 * best <= found <= best + 1e-4


def test_the_fastest_plan_depends_on_latency():
    flat = dict.fromkeys(ppd.SIZES, 1.0)
    assert fastest(TWO, flat).accepted == plan(TWO, 64).accepted
    # Where each input costs as much as a pass, guessing does not pay.
    assert fastest(TWO, {size: float(size) for size in ppd.SIZES}).accepted == 1
    middle = fastest(TWO, {size: 8.0 + size for size in ppd.SIZES})
    assert 1 < middle.accepted < plan(TWO, 64).accepted
    # 8 and 10 seconds for 2 and 4 inputs; a third of the steps has 2.
    steps = plan(((0.5,),), 3)
    assert steps.seconds({2: 8.0, 4: 10.0}) == pytest.approx(8 / 3 + 9 * 2 / 3, abs=1e-4)


def test_where_steps_begin():
    # Chains of two under the first and the deepest guess, else of one.
    trees = Tree(((),), (2,)), Tree(((), (0,)), (1, 2)), Tree(((), (0,), (0, 1)), (1, 0, 2))
    found = Plan(trees, (0, 0, 1), 1, 1)
    right, half, wrong = [0, 1], [0, 0], [RANKS, RANKS]
    assert begins(found, [right] * 8) == [0, 3, 6]
    # After one right guess no chain hangs there, so that the next step, at 2, makes no guess.
    assert begins(found, [half] * 8) == [0, 3, 6]
    # After none the chain is of one, which leads to two where its guess is right.
    assert begins(found, [wrong] * 4) == [0, 1, 2, 3]
    assert begins(found, [wrong, right, right, right, right]) == [0, 1, 3]
    assert begins(plan(((0.6,),), 1), [[0]] * 5) == []


def test_accuracies_by_hand():
    ranks = torch.tensor([[0, 0], [0, 1], [0, RANKS], [RANKS, 0]])
    shares = ppd._shares(ranks)
    assert shares[0].tolist() == [0.75] + [0] * 9
    assert shares[1].tolist() == pytest.approx([1 / 3, 1 / 3] + [0] * 8)  # of three, not of four


def random_ppd(model, prompts=2, copies=2):
    torch.manual_seed(3)
    width = model.config.hidden_size
    found = PPD(torch.randn(prompts, copies, width) * 0.1)
    found.accuracy.copy_(torch.rand(prompts, RANKS).sort(descending=True).values / 5)
    return found


def test_a_tree_equals_plain_passes():
    """Ancestors alone are seen, positions are depths, and copy j sees copy j of its own chain."""
    model = tinylm.model(num_key_value_heads=2).eval()
    prompts = random_ppd(model)
    tree = Tree(((), (0,), (1,), (0, 1)), (1, 0, 2, 2))
    inputs = Inputs.of(tree, 2, torch.device("cpu"))
    tokens, ids = [5, 6, 7, 8], torch.randint(128, (1, 9))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        logits = ppd._step(model, prompts, inputs, tokens, cache)
        assert len(logits) == tree.size(2) == 4 + 2 * 5
        embed = model.get_input_embeddings()
        paths = {0: [5], 1: [5, 6], 2: [5, 7], 3: [5, 6, 8]}
        for node, path in paths.items():
            text = torch.cat([ids, torch.tensor([path])], 1)
            want = model(text).logits[0, -1]
            torch.testing.assert_close(logits[node], want, atol=1e-5, rtol=1e-4)
            for at in inputs.chain[node]:
                step, copy = divmod(at - inputs.chain[node].start, 2)
                tail = prompts.embeddings[: step + 1, copy][None]
                want = model(inputs_embeds=torch.cat([embed(text), tail], 1)).logits[0, -1]
                torch.testing.assert_close(logits[at], want, atol=1e-5, rtol=1e-4)
        # Of what was rejected nothing is left.
        keep_rows(cache, 9, torch.tensor([0, 1, 3]))
        plain = DynamicCache(config=model.config)
        model(torch.cat([ids, torch.tensor([paths[3]])], 1), past_key_values=plain, use_cache=True)
        assert cache.get_seq_length() == 12
        for kept, want in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(kept.keys, want.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(kept.values, want.values, atol=1e-5, rtol=1e-4)


MODELS = {
    "llama": lambda: tinylm.trained(),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, rotary_pct=0.5)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
}


def corpus_starts(count, length, seed=1):
    return next(tinylm.batches(tinylm.corpus()[1], 1, seed, count, length)).split(1)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_equals_generate(kind):
    model = MODELS[kind]().eval()
    prompts = random_ppd(model)
    longer = 0
    for length, size in ((1, 1), (7, 6), (20, 40)):
        for ids in corpus_starts(3, length):
            ids = ids % model.config.vocab_size
            want = model.generate(ids, max_new_tokens=21, do_sample=False, use_cache=True)
            found = ppd_generate(model, prompts, ids, max_new_tokens=21, tree=size)
            assert torch.equal(found.ids, want)
            assert len(found.ids[0]) - length <= sum(found.accepted)
            longer += sum(n > 1 for n in found.accepted)
            assert size > 1 or set(found.accepted) == {1}
    assert longer > 0  # some guesses were right, so that accepted rows were put in order


def test_sixteen_bits():
    model = MODELS["qwen2"]().eval().bfloat16()
    ids = torch.randint(64, (1, 20))
    batches = [torch.randint(64, (2, 20)) for _ in range(3)]
    prompts = PPD.fit(model, batches, prompts=2)
    assert prompts.embeddings.dtype == torch.bfloat16 and prompts.accuracy.dtype == torch.float32
    found = ppd_generate(model, prompts, ids, max_new_tokens=9, tree=12)
    assert found.ids.shape == (1, 29)


def test_text_ends_where_generate_ends():
    model = tinylm.trained()
    prompts = random_ppd(model)
    ids = corpus_starts(1, 20)[0]
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=True)
    for end in plain[0, 20:].unique().tolist():
        model.generation_config.eos_token_id = [end]
        want = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=True)
        found = ppd_generate(model, prompts, ids, max_new_tokens=30, tree=24)
        assert torch.equal(found.ids, want)


def test_typical_tokens_are_above_the_threshold():
    model = tinylm.trained()
    prompts = random_ppd(model)
    ids = corpus_starts(1, 20)[0]
    texts = [
        ppd_generate(model, prompts, ids, max_new_tokens=30, tree=32, mode="typical", seed=seed).ids
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    for text in texts:
        p = model(text).logits[0, 19:-1].softmax(-1)
        limit = (0.09 * (p * p.log()).sum(-1).exp()).clamp(max=0.3)
        assert (p.gather(1, text[0, 20:, None])[:, 0] > limit - 1e-6).all()


def test_acceptance_by_hand():
    """Typical: 0.2 is above 0.09 exp(-entropy), 0.001 is not; the longest path wins."""
    tree = Tree(((), (0,), (1,), (1, 0)), (0, 0, 0, 0))
    inputs = Inputs.of(tree, 1, torch.device("cpu"))
    p = torch.tensor([[0.799, 0.2, 0.001], [0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    generator = torch.Generator()
    assert accept(inputs, [2, 0, 1, 2], p.log(), generator) == ([0, 2, 3], 0)
    assert accept(inputs, [2, 0, 1, 2], p.log(), None) == ([0, 1], 1)
    assert accept(inputs, [2, 2, 2, 2], p.log(), None) == ([0], 0)
    # Of equally long paths the likelier.
    assert accept(inputs, [2, 1, 0, 1], p.log(), generator) == ([0, 2], 2)


def test_a_step_holds_its_inputs_and_keeps_the_accepted(monkeypatch):
    model = tinylm.trained()
    prompts = random_ppd(model, 3, 1)
    sizes = []

    def spy(cache, start, rows):
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        before = sum(t.nbytes for t in held)
        keep_rows(cache, start, rows)
        after = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        sizes.append((before, after, len(rows)))

    monkeypatch.setattr(ppd, "keep_rows", spy)
    ids = corpus_starts(1, 20)[0]
    found = ppd_generate(model, prompts, ids, max_new_tokens=20, tree=16)
    entry = 2 * 2 * 4 * 16 * 4  # keys and values, layers, heads, width of a head, bytes
    kept, planned = 19, {tree.size(1) for tree in found.plan.trees}
    for (before, after, rows), accepted in zip(sizes, found.accepted, strict=True):
        assert before // entry - kept in planned and before % entry == 0
        kept += accepted
        assert rows == accepted and after == kept * entry


def test_the_loss_equals_one_chain_after_the_other():
    model = tinylm.model(num_hidden_layers=1).eval()
    prompts = random_ppd(model)
    ids = torch.randint(128, (2, 12))
    places = torch.randint(1, 11, (2, 3), generator=torch.Generator().manual_seed(5))
    found = prompts._loss(model, ids, 3, torch.Generator().manual_seed(5))
    want = 0
    teacher = model(ids).logits.log_softmax(-1)
    for row, cut in ((b, cut) for b in range(2) for cut in places[b].tolist()):
        logits = 0
        for copy in range(2):
            text = model.get_input_embeddings()(ids[row : row + 1, :cut])
            chained = torch.cat([text, prompts.embeddings[:, copy][None]], 1)
            logits = logits + model(inputs_embeds=chained).logits[0, cut:] / 2
        for i in range(2):
            said = logits[i].log_softmax(-1)
            want = want + 0.8**i * F.kl_div(said, teacher[row, cut + i], log_target=True,
                                            reduction="sum") / 12  # fmt: skip
    torch.testing.assert_close(found, want)
    got, expected = (torch.autograd.grad(x, prompts.embeddings)[0] for x in (found, want))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_fit_trains_the_embeddings_alone(monkeypatch):
    model = tinylm.trained().train()
    before = [p.detach().clone() for p in model.parameters()]
    losses, asking = [], []
    plain = PPD._loss

    def loss(self, model, *rest):
        asking.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        value = plain(self, model, *rest)
        losses.append(value.item())
        return value

    monkeypatch.setattr(PPD, "_loss", loss)
    batches = list(tinylm.batches(tinylm.corpus()[0], 31, 0, 8, 48))
    found = PPD.fit(model, batches, prompts=2, copies=3, lr=0.03)
    assert sum(p.nbytes for p in found.parameters()) == 2 * 3 * 64 * 4
    assert found.nbytes == 2 * 3 * 64 * 4 + 4 * 2 * RANKS
    assert not any(asking) and len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
    assert (found.accuracy.sum(1) <= 1).all() and found.accuracy.any()
    again = PPD(torch.zeros(2, 3, 64))
    again.load_state_dict(found.state_dict())
    assert again.plan(16) == found.plan(16)
    same = PPD.fit(model, batches, prompts=2, copies=3, lr=0.03)
    assert torch.equal(same.embeddings, found.embeddings)


def test_auto_measures_this_device_once():
    model = tinylm.trained()
    prompts = random_ppd(model)
    ids = corpus_starts(1, 20)[0]
    with pytest.raises(UsageError, match=r"latency was not measured; call tune"):
        prompts.plan()
    found = ppd_generate(model, prompts, ids, max_new_tokens=20)
    measured = dict(prompts.latency)
    assert set(measured) == set(ppd.SIZES) and min(measured.values()) > 0
    assert found.plan == fastest(tuple(map(tuple, prompts.accuracy.tolist())), measured, 2)
    ppd_generate(model, prompts, ids, max_new_tokens=20)
    assert prompts.latency == measured
    prompts.latency = {1: 1.0, 64: 1e6}
    assert ppd_generate(model, prompts, ids, max_new_tokens=5).plan.size == 1


def test_bad_input():
    model = tinylm.model()
    ids = torch.randint(128, (2, 9))
    with pytest.raises(UsageError, match="prompts=0, copies=1: PPD needs at least 1"):
        PPD.fit(model, [ids], prompts=0)
    with pytest.raises(UsageError, match=r"shape \(0, 1, 64\); expected"):
        PPD(torch.zeros(0, 1, 64))
    with pytest.raises(UsageError, match="the dataset is empty"):
        PPD.fit(model, [])
    with pytest.raises(UsageError, match=r"expected \(B,n\) with n of at least 5"):
        PPD.fit(model, [ids[:, :4], ids])
    with pytest.raises(UsageError, match=r"rows of 6 tokens leave no room.*at least 8"):
        PPD.fit(model, [ids[:, :6]])
    prompts = random_ppd(model)
    with pytest.raises(UsageError, match=r"unknown mode 'beam'.*greedy, typical"):
        ppd_generate(model, prompts, ids[:1], mode="beam", tree=4)
    with pytest.raises(UsageError, match=r"\(2, 9\); PPD continues one sequence at a time"):
        ppd_generate(model, prompts, ids, tree=4)
    with pytest.raises(UsageError, match="tree=0: a step has at least 1 input"):
        ppd_generate(model, prompts, ids[:1], tree=0)
    windowed = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8))
    with pytest.raises(UsageError, match=r"Mistral.*DynamicSlidingWindowLayer.*taken back"):
        ppd_generate(windowed, prompts, ids[:1], tree=4)
