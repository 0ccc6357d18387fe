import numpy as np

from holdfast.longterm.retrieval.rows import BLOCK, PIECE, Rows


def test_products_are_those_of_the_rows_as_kept():
    r = np.random.default_rng(0)
    rows, vector = Rows(8), r.standard_normal(8).astype(np.float32)
    assert rows.dot(vector).shape == (0,)
    # Rows of many sizes, so that one piece's scales are no other's.
    every = r.standard_normal((BLOCK + 2 * PIECE + 5, 8)).astype(np.float32)
    every *= np.linspace(0.1, 5, len(every), dtype=np.float32)[:, None]
    for part in np.array_split(every, 7):
        rows.append(part)
    got = rows.dot(vector)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, rows.take(np.arange(len(every))) @ vector, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, every @ vector, atol=0.3)
