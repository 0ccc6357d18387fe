"""Sequence parallelism: on two and four ranks what one process computes, in fewer bytes."""

import warnings

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch.distributed.device_mesh import init_device_mesh
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function

from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal
from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.parallel import sequence
from holdfast.parallel.launch import launch
from holdfast.parallel.ring import Traffic
from holdfast.parallel.ring_attention import (
    Layout,
    Pattern,
    ring_attention,
    ring_nbytes,
    saved_nbytes,
)
from holdfast.parallel.sequence import sequence_parallel

WIDTH, VOCAB, LENGTH = 16, 32, 21
FORMS = [(a, b) for a in ("rsa", "online") for b in ("contiguous", "zigzag")]
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 4, "vocab_size": VOCAB}


def llama(**options):
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "intermediate_size": 24, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | options))).train()


def gpt2(dropout=0.0):
    """Its table of positions ends where the sequence ends: padding must not go beyond."""
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = hf.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=LENGTH)
    config.update(drops | ends)
    return hf.GPT2LMHeadModel(config).train()


def mistral():
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 24, "num_key_value_heads": 2}
    return hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=6)).train()


def bert():
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 24}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, **drops)).train()


def batch(padded):
    """One row padded on the left, one on the right; unequal numbers of labels on the ranks."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        mask[1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 7:15] = -100
    inputs = {"input_ids": ids, "labels": labels}
    return inputs | {"attention_mask": mask} if padded else inputs


def differences(make, attention, layout, padded):
    """Largest differences of logits, loss and gradients from one process, and bytes sent."""
    inputs = batch(padded)
    reference, model = make(), make()
    want = reference(**inputs)
    want.loss.backward()
    if dist.get_rank():
        with torch.no_grad():
            next(model.parameters()).zero_()  # weights come from the first rank
    parallel = sequence_parallel(model, None, attention, layout)
    got = model(**inputs)
    got.loss.backward()
    logits = parallel.gather(got.logits)
    seen = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
    found = [
        (logits - want.logits)[seen].abs().max().item(),
        (got.loss - want.loss).abs().item(),
        max((p.grad - q.grad).abs().max().item()
            for p, q in zip(model.parameters(), reference.parameters(), strict=True)),
    ]  # fmt: skip
    return (found, parallel.traffic.sent, got.logits.shape[1])


def pattern(length, attention="online", layout="zigzag", **options):
    ranks = dist.get_world_size()
    shape = Layout(length, ranks, layout == "zigzag")
    found = {"group": None, "traffic": Traffic(), "valid": None, "seed": 7} | options
    return Pattern(shape, dist.get_rank(), attention=attention, **found)


def tensors(length, dtype=torch.float32, heads=2):
    g = torch.Generator().manual_seed(3)
    shapes = [(2, 4, length, 8), (2, heads, length, 8), (2, heads, length, 8), (2, 4, length, 8)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def split(x, layout):
    """(B,H,L,A) -> this rank's (B,H,n,A)."""
    return layout.split(x.transpose(1, 2), dist.get_rank()).transpose(1, 2)


def on_tensors(length, attention, layout, dtype=torch.float32, dropout=0.0):
    """Relative errors of output and gradients against one process, saved and sent bytes."""
    *given, dout = tensors(length, dtype)
    whole = [x.double().requires_grad_() for x in given]
    want, _ = attention_with_lse(*whole, mask=Causal(), dropout=dropout, seed=7 + 1000003)
    expected = [want, *torch.autograd.grad(want, whole, dout.double())]
    how = pattern(length, attention, layout)
    mine = [split(x, how.layout).contiguous().requires_grad_() for x in given]
    saved = []

    def keep(x):
        saved.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = ring_attention(*mine, how, dropout=dropout, layer=1)
    forward = how.traffic.sent
    grads = torch.autograd.grad(out, mine, split(dout, how.layout))
    errors = [
        ((x - split(y, how.layout)).norm() / y.norm()).item()
        for x, y in zip((out, *grads), expected, strict=True)
    ]
    return errors, sum(saved), (forward, how.traffic.sent - forward)


def work(length, layout):
    """Scores that this rank computes under a causal mask."""
    how = pattern(length, layout=layout)
    pairs = 0
    for owner in range(dist.get_world_size()):
        for rows, _, spec in how.pairs(owner, 1.0, 0.0, 0):
            n = rows.stop - rows.start
            pairs += n * (n + 1) // 2 if spec.mask else n * n
    return pairs


def peaks(length, attention):
    """Bytes of a step's activations and temporaries at its peak, by the meter."""
    model = llama()
    sequence_parallel(model, None, attention)
    ids = torch.randint(VOCAB, (1, length))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    step()
    with Meter(model, inputs=ids) as meter:
        step()
    return meter.peak - meter.base


def training_habits():
    """Accumulation, recomputation, frozen weights, given positions and embeddings."""
    inputs = batch(True)
    reference, model = llama(), llama()
    model.gradient_checkpointing_enable()
    frozen = [m.get_parameter("model.layers.0.self_attn.q_proj.weight") for m in (reference, model)]
    for weight in frozen:
        weight.requires_grad_(False)
    sequence_parallel(model)
    positions = torch.arange(LENGTH)[None] + 3
    for shift in range(2):
        rolled = {name: x.roll(shift, 0) for name, x in inputs.items()}
        for m in (reference, model):
            # Of all the micro-batches' labels, as transformers' Trainer counts.
            m(**rolled, position_ids=positions, num_items_in_batch=50).loss.backward()
    for weight in frozen:
        weight.requires_grad_(True)
    for m in (reference, model):
        embedded = m.get_input_embeddings()(inputs["input_ids"])
        m(inputs_embeds=embedded, labels=inputs["labels"]).loss.backward()
    return max(
        (p.grad - q.grad).abs().max().item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )


def dropout_draws():
    """Equal tokens at equal places of two ranks get different noise, a seed the same again."""
    model = gpt2(dropout=0.5)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    parallel = sequence_parallel(model, None, layout="contiguous")
    ids = torch.zeros(1, 8 * parallel.ranks, dtype=torch.long)
    noise = []
    hook = model.transformer.drop.register_forward_hook(lambda m, a, out: noise.append(out == 0))
    after = []
    for _ in range(2):
        torch.manual_seed(4)
        model(ids)
        after.append(torch.rand(1).item())
    model(ids)
    hook.remove()
    everyone = [torch.empty_like(noise[0]) for _ in range(parallel.ranks)]
    dist.all_gather(everyone, noise[0])
    return (
        torch.equal(noise[0], noise[1]), not torch.equal(noise[0], noise[2]),
        not torch.equal(everyone[0], everyone[1]), after[0] == after[1],
    )  # fmt: skip


def message(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except UsageError as error:
        return str(error)
    return ""


def errors_of_two():
    model = llama()
    parallel = sequence_parallel(model, pad=False)
    inputs = batch(True)
    said = {
        "length": message(model, **inputs),
        "again": message(sequence_parallel, model),
        "cache": message(model, inputs["input_ids"], past_key_values=hf.DynamicCache()),
        "nothing": message(model),
        "gather": message(parallel.gather, torch.zeros(2, 3)),
        "part": message(model.model, inputs["input_ids"]),
        "layer": message(model.model.layers[0].self_attn, torch.zeros(1, 2, WIDTH),
                         (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))),
    }  # fmt: skip
    parallel.remove()
    plain = model(**inputs).logits
    ids = inputs["input_ids"]
    said["removed"] = str(torch.equal(plain, llama()(**inputs).logits))
    parallel = sequence_parallel(model)
    packed = torch.arange(LENGTH).remainder(9).expand(2, -1)
    said["packed"] = message(model, ids, position_ids=packed)
    said["mask"] = message(model, ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
    said["tuple"] = message(model, ids, return_dict=False)
    said["kept"] = message(model, ids, logits_to_keep=1)
    sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 24, "num_key_value_heads": 2}
    classes = hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes, pad_token_id=0))
    sequence_parallel(classes)
    said["loss"] = message(classes, ids[:1], labels=torch.zeros(1).long())
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("sequence", "data"))
    said["mesh"] = message(sequence_parallel, llama(), mesh)
    parallel = sequence_parallel(llama(), mesh["sequence"])
    said["ranks"] = f"{parallel.ranks}"
    gemma = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, head_dim=4))
    sequence_parallel(gemma)
    said["softcap"] = message(gemma, ids)
    return said


def _of_two():
    warnings.simplefilter("ignore")
    return {
        "models": {
            (make.__name__, form, padded): differences(make, *form, padded)
            for make in (llama, gpt2, mistral, bert)
            for form in (FORMS[0], FORMS[3])
            for padded in (False, True)
        },
        "tensors": {form: on_tensors(24, *form) for form in FORMS},
        "dropped": {form: on_tensors(24, *form, dropout=0.4) for form in (FORMS[0], FORMS[3])},
        "bf16": {
            form: on_tensors(24, *form, dtype=torch.bfloat16) for form in (FORMS[0], FORMS[3])
        },
        "work": {layout: work(64, layout) for layout in ("contiguous", "zigzag")},
        "peaks": {
            (a, length): peaks(length, a) for a in ("rsa", "online") for length in (128, 256)
        },
        "habits": training_habits(),
        "noise": dropout_draws(),
        "errors": errors_of_two(),
    }


def _of_four():
    warnings.simplefilter("ignore")
    return {
        "models": {
            (make.__name__, form, padded): differences(make, *form, padded)
            for make, form, padded in (
                (llama, FORMS[1], True), (llama, FORMS[2], False), (gpt2, FORMS[3], True),
                (gpt2, FORMS[0], False),
            )
        },
        "tensors": {form: on_tensors(48, *form) for form in FORMS},
        "dropped": {form: on_tensors(48, *form, dropout=0.4) for form in (FORMS[1], FORMS[2])},
        "work": {layout: work(64, layout) for layout in ("contiguous", "zigzag")},
        "peaks": {("online", 256): peaks(256, "online")},
    }  # fmt: skip


@pytest.fixture(scope="module")
def two():
    return launch(_of_two, 2, limit=240.0)


@pytest.fixture(scope="module")
def four():
    return launch(_of_four, 4, limit=240.0)


@pytest.fixture(params=[2, 4])
def ranks(request):
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def test_models_equal_one_process(ranks):
    for rank in ranks:
        for case, (found, _, tokens) in rank["models"].items():
            assert max(found) < 1e-5, case
            parts = len(ranks) * (2 if case[1][1] == "zigzag" else 1)
            assert tokens == -(-LENGTH // parts) * parts // len(ranks), case


def test_attention_equals_one_process_with_and_without_dropout(ranks):
    for rank in ranks:
        for case, (errors, _, _) in (*rank["tensors"].items(), *rank["dropped"].items()):
            assert max(errors) < 1e-5, case
        # Of values with eight bits; partial results of ranks are merged in fp32.
        for case, (errors, _, _) in rank.get("bf16", {}).items():
            assert max(errors) < 0.02, case


def test_saved_and_sent_bytes_equal_the_formulas(ranks):
    n = len(ranks)
    for rank in ranks:
        for itemsize, cases in ((4, rank["tensors"]), (2, rank.get("bf16", {}))):
            for (attention, _), (_, saved, sent) in cases.items():
                shape = {
                    "batch": 2,
                    "length": 12 * n,
                    "key_heads": 2,
                    "size": 8,
                    "itemsize": itemsize,
                }
                assert saved == saved_nbytes(attention, n, heads=4, **shape)
                assert sent == ring_nbytes(n, **shape)


def test_bytes_by_hand():
    # 2 rows, 4 query heads and 2 key heads of 8 elements, 6 of 24 tokens on each rank.
    shape = {"batch": 2, "length": 24, "key_heads": 2, "size": 8}
    assert saved_nbytes("rsa", 4, heads=4, **shape) == 4 * (384 + 2 * 192 + 2 * 4 * 6 * 24)
    assert saved_nbytes("online", 4, heads=4, **shape) == 4 * (2 * 384 + 2 * 192 + 48)
    assert ring_nbytes(4, **shape) == (2 * 3 * 192 * 4, 4 * 3 * 192 * 4)
    assert ring_nbytes(4, **shape, itemsize=2) == (2 * 3 * 192 * 2, 2 * 3 * 192 * (2 + 4))


def test_a_models_traffic_is_that_of_its_attentions(two):
    shape = {"batch": 2, "length": 24, "key_heads": 2, "size": WIDTH // 4}
    _, sent, _ = two[0]["models"]["llama", ("online", "zigzag"), True]
    assert sent == 2 * sum(ring_nbytes(2, **shape))


def test_no_quadratic_term_online_and_half_the_bytes_on_twice_the_ranks(two, four):
    first, more = two[0]["peaks"], four[0]["peaks"]
    assert 1.98 < first["online", 256] / first["online", 128] < 2.02
    assert 1.98 < first["online", 256] / more["online", 256] < 2.02
    assert first["rsa", 256] / first["rsa", 128] > 3
    # Gloo's thread may let go of a scalar a moment later on one rank than on another.
    found = [rank["peaks"]["online", 256] for rank in four]
    assert max(found) - min(found) <= 64


def test_zigzag_gives_every_rank_the_same_work(ranks):
    n = len(ranks)
    assert {rank["work"]["zigzag"] for rank in ranks} == {64 * 65 // 2 // n}
    contiguous = [rank["work"]["contiguous"] for rank in ranks]
    assert sum(contiguous) == 64 * 65 // 2 and contiguous[-1] > (n - 1) * contiguous[0]


def test_accumulation_recomputation_frozen_weights_positions_and_embeddings(two):
    assert all(rank["habits"] < 1e-5 for rank in two)


def test_dropout_differs_between_ranks_and_repeats_with_its_seed(two):
    assert all(rank["noise"] == (True, True, True, True) for rank in two)


def test_errors(two):
    for rank in two:
        said = rank["errors"]
        assert (
            "21 tokens cannot be split into 4 equal parts; use 24 tokens, or pad=True"
            in said["length"]
        )
        assert "is sequence-parallel already" in said["again"]
        assert "past_key_values was given" in said["cache"]
        assert "attention_mask has shape (2, 1, 21, 21); expected (2, 21)" in said["mask"]
        assert "one of input_ids and inputs_embeds" in said["nothing"]
        assert "not of the last batch's tokens" in said["gather"]
        assert "was called alone" in said["part"]
        assert "outside of its model's forward pass" in said["layer"]
        assert said["removed"] == "True"
        assert "packed sequences cannot be split" in said["packed"]
        assert "return_dict=False" in said["tuple"]
        assert "logits_to_keep was given" in said["kept"]
        assert "loss of LlamaForSequenceClassification is not a mean over tokens" in said["loss"]
        assert "pass one of them" in said["mesh"] and said["ranks"] == "2"
        assert "attends with softcap" in said["softcap"]


def test_unknown_names_and_no_process_group():
    with pytest.raises(UsageError, match="unknown attention 'ring'; nearest known: "):
        saved_nbytes("ring", 2, batch=1, length=2, heads=1, key_heads=1, size=1)
    with pytest.raises(UsageError, match="unknown attention 'ring'"):
        Pattern(Layout(2, 1, False), 0, None, Traffic(), "ring", None, 0)
    with pytest.raises(UsageError, match="unknown attention 'ulysses'; nearest known: "):
        sequence_parallel(llama(), attention="ulysses")
    with pytest.raises(UsageError, match="unknown layout 'zig-zag'; nearest known: zigzag"):
        sequence_parallel(llama(), layout="zig-zag")
    model = llama()
    with pytest.raises(UsageError, match="start the script with torchrun"):
        sequence_parallel(model)
    assert model.config._attn_implementation == "sdpa"


def test_masks_of_this_ranks_tokens_alone_are_refused():
    lengths = torch.zeros(1, dtype=torch.long)
    for wrong in (
        {"mask_function": masking_utils.chunked_causal_mask_function(4, lengths)},
        {"mask_function": causal_mask_function, "use_vmap": True},
    ):
        token = sequence._batch.set(
            Pattern(Layout(2, 1, False), 0, None, Traffic(), "rsa", None, 0)
        )
        try:
            with pytest.raises(UsageError, match="takes full, causal and sliding-window masks"):
                sequence._mask(**wrong)
        finally:
            sequence._batch.reset(token)


@pytest.mark.parametrize("zigzag", [False, True])
def test_layouts_cover_the_sequence_and_join_what_they_split(zigzag):
    x = torch.arange(2 * 24 * 3).view(2, 24, 3)
    for ranks in (1, 2, 3, 4):
        layout = Layout(24, ranks, zigzag)
        parts = [layout.split(x, rank) for rank in range(ranks)]
        assert torch.equal(layout.join(parts), x)
    if zigzag:
        assert Layout(8, 2, True).split(torch.arange(8)[None], 0).tolist() == [[0, 1, 6, 7]]
