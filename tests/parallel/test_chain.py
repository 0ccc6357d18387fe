"""Causal language models as chains of blocks."""

import pytest
import torch
import transformers as hf
from torch import nn

from holdfast.checks import tinylm
from holdfast.errors import UsageError
from holdfast.parallel.chain import causal_lm_chain, next_token_loss

N = 12


def llama():
    return tinylm.model(num_hidden_layers=3, hidden_size=32, intermediate_size=48)


def gpt2():
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=N)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def opt():
    sizes = dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, vocab_size=128, dropout=0.0)
    return hf.OPTForCausalLM(
        hf.OPTConfig(**sizes, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=N)
    )


def one_layer():
    return tinylm.model(num_hidden_layers=1, hidden_size=32, intermediate_size=48)


@pytest.mark.parametrize("make", [llama, gpt2, opt, one_layer])
def test_chain_is_the_model(make):
    torch.manual_seed(0)
    model = make().train()
    ids = torch.randint(3, 128, (3, N))
    expected = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    chain = causal_lm_chain(model, ids)
    assert model.training and all(block.training for block in chain)
    loss = next_token_loss(nn.Sequential(*chain)(ids), ids)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-4)
    # Every parameter is in a block, one of two blocks in one where it is tied.
    held = [p for block in chain for p in block.parameters()]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) - len(list(model.parameters())) == model.config.tie_word_embeddings


def test_loss_is_the_models():
    model = llama()
    ids = torch.randint(0, 128, (2, N))
    out = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(next_token_loss(out.logits, ids), out.loss)


def test_what_is_no_chain_is_refused():
    scaled = hf.CohereForCausalLM(
        hf.CohereConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=64, logit_scale=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(UsageError, match="CohereForCausalLM computes something between its layers"):
        causal_lm_chain(scaled, torch.randint(3, 64, (1, N)))
    with pytest.raises(UsageError, match="Linear has 0 stacks of layers and no language model"):
        causal_lm_chain(nn.Linear(2, 2), torch.zeros(1, N, dtype=torch.int64))
