from pathlib import Path

from holdfast import host


def test_data_lie_beside_the_checkout_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("HOLDFAST_DATA", raising=False)
    checkout = Path(host.__file__).parents[1]
    assert host.data_dir() == checkout.parent / "shared" / "data"
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    assert host.data_dir() == tmp_path


def test_peak_rss_sees_memory_that_is_touched():
    with host.PeakRss() as rss:
        touched = bytearray(64 * 2**20)
        touched[:: 2**12] = b"\1" * len(touched[:: 2**12])
    assert 56 * 2**20 <= rss.increase <= 128 * 2**20
