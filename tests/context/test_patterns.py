"""Block patterns: which blocks are chosen, and that every form of a pattern says the same."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from holdfast.context.panels import panel_attention
from holdfast.context.patterns import BlockPattern, sliding_panels
from holdfast.errors import UsageError

HEADS = 3


def test_a_row_has_window_global_and_random_blocks_and_none_twice():
    seen = BlockPattern(8).table(20, HEADS)
    counts = seen.sum(-1)
    assert (counts[:, [0, -1]] == 20).all() and (seen[:, :, [0, -1]]).all()
    # Next to a global block the window reaches into it.
    assert (counts[:, [1, -2]] == 7).all() and (counts[:, 2:-2] == 8).all()
    assert all(seen[:, i, i + o].all() for i in range(1, 19) for o in (-1, 0, 1))
    for rows, keys, _ in BlockPattern(8).panels(20, HEADS):
        if keys is not None:
            assert keys.shape[:2] == (HEADS, len(rows))
            assert all(len(set(own)) == len(own) for own in keys.reshape(-1, keys.shape[2]))
            assert (keys[:, :, -1] == rows).all()


def test_more_global_blocks_and_wider_windows():
    pattern = BlockPattern(4, window=5, global_=3, random=2)
    seen = pattern.table(16, HEADS)
    everywhere = [0, 1, 15]
    assert seen[:, everywhere].all() and seen[:, :, everywhere].all()
    assert (seen[:, 4:13].sum(-1) == pattern.width).all() and pattern.width == 10


def test_causal_patterns_look_back_alone():
    pattern = BlockPattern(8, window=2, global_=1, random=2, causal=True)
    seen = pattern.table(12, HEADS)
    assert not np.triu(seen, 1).any()
    assert seen.sum(-1)[0].tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5]
    dense = pattern.dense(90, HEADS)
    assert not dense.triu(1).any() and dense.diagonal(dim1=1, dim2=2).all()


def test_random_blocks_are_fixed_by_seed_layer_head_and_row():
    pattern = BlockPattern(8)
    seen = pattern.table(40, HEADS)
    assert (seen == pattern.table(40, HEADS)).all()
    assert (pattern.table(40, HEADS + 2)[:HEADS] == seen).all()
    for other in (pattern.table(40, HEADS, layer=1), BlockPattern(8, seed=1).table(40, HEADS)):
        assert (other != seen).any()
    assert (seen[0] != seen[1]).any()
    # The same everywhere and for ever: a trained model was trained with these.
    pinned = [0, 4, 5, 6, 7, 28, 29, 39], [0, 12, 19, 20, 21, 22, 35, 39]
    assert [np.flatnonzero(seen[0, row]).tolist() for row in (5, 20)] == list(pinned)


def test_random_blocks_are_evenly_spread():
    seen = BlockPattern(1, window=1, global_=0, random=3).table(11, 400)
    assert (seen.sum(-1) == 4).all()
    share = seen.mean(0)[~np.eye(11, dtype=bool)]
    # 400 draws of 3 in 10: a standard deviation is 0.023.
    assert abs(share - 0.3).max() < 0.1 and abs(share.mean() - 0.3) < 1e-9


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [160, 157])
def test_mask_function_dense_mask_and_flex_agree(n, causal):
    pattern = BlockPattern(8, causal=causal)
    valid = torch.rand(2, n) > 0.3
    seen = np.kron(pattern.table(20, HEADS), np.ones((8, 8), bool))[:, :n, :n]
    seen = torch.from_numpy(seen & (np.tri(n, dtype=bool) | (not causal)))
    assert torch.equal(pattern.dense(n, HEADS), seen)
    for padding in (None, valid):
        ours = pattern.block_mask(n, HEADS, valid=padding)
        theirs = create_block_mask(
            ours.mask_mod, None if padding is None else 2, HEADS, n, n, device="cpu", BLOCK_SIZE=8
        )
        # Lists of blocks: ours may name a block that padding hides, never leave one out.
        missing = theirs.to_dense().bool() & ~ours.to_dense().bool()
        assert not missing.any()
        blocks = torch.from_numpy(pattern.table(20, HEADS))
        assert torch.equal(ours.to_dense()[0].bool(), blocks)
        full = ours.full_kv_num_blocks.sum() if padding is None else 0
        assert full > 0 or padding is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_takes_the_block_mask():
    pattern, n = BlockPattern(8), 157
    q, k, v = (torch.randn(2, HEADS, n, 16) for _ in range(3))
    valid = torch.rand(2, n) > 0.3
    for padding in (None, valid):
        out = flex_attention(q, k, v, block_mask=pattern.block_mask(n, HEADS, valid=padding))
        want, _ = panel_attention(q, k, v, pattern.panels(20, HEADS), 8, valid=padding)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reach", [0, 3, 8])
def test_sliding_panels_cover_each_pair_within_reach_once(reach):
    n = 40
    found = torch.zeros(n, n, dtype=torch.int)
    for rows, keys, hidden in sliding_panels(5, 8, reach):
        assert keys is not None and keys.shape[0] == 1
        for row, blocks in zip(rows, keys[0], strict=True):
            i = torch.arange(row * 8, row * 8 + 8)
            j = torch.cat([torch.arange(b * 8, b * 8 + 8) for b in blocks.tolist()])
            seen = 1 if hidden is None else torch.from_numpy(~hidden).int()
            found[i[:, None], j] += seen
    at = torch.arange(n)
    assert torch.equal(found, ((at[:, None] - at).abs() <= reach).int())


def test_bad_patterns_say_what_to_do():
    with pytest.raises(UsageError, match=r"window=4 blocks cannot lie evenly.*odd number"):
        BlockPattern(window=4)
    with pytest.raises(UsageError, match="random=-1 is out of range; use 0 up"):
        BlockPattern(random=-1)
    with pytest.raises(UsageError, match="4 blocks of 64 tokens hold no pattern of 5 blocks"):
        BlockPattern().panels(4, HEADS)
    with pytest.raises(UsageError, match="reach=9 tokens lies outside blocks of 8"):
        sliding_panels(5, 8, 9)


def test_full_is_better_up_to_the_published_bound():
    pattern = BlockPattern()
    assert pattern.is_full(11) and not pattern.is_full(12)  # 704 tokens
