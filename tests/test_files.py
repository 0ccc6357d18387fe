import os
import stat

import pytest
import torch
from safetensors import safe_open

from holdfast.errors import HoldfastError
from holdfast.files import whole_directory, write_tensors, write_text
from holdfast.meter import Meter


def test_safetensors_reads_what_is_written(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "float": torch.randn(4, 5),
        "brain": torch.randn(7).bfloat16(),
        "transposed": torch.randn(3, 2).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "tiny": torch.randn(4).to(torch.float8_e4m3fn),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    with safe_open(str(tmp_path / "x.safetensors"), "pt") as file:
        assert file.metadata() == {"made": "here"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.float(), tensor.float())


def test_writing_holds_no_copy(tmp_path):
    tensor = torch.randn(1 << 20)
    with Meter(inputs=tensor) as meter:
        write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert meter.peak == tensor.nbytes


def test_unwritable_file_is_named(tmp_path):
    with pytest.raises(HoldfastError, match=r"cannot write .*x.safetensors .*earlier files"):
        write_tensors(tmp_path / "missing" / "x.safetensors", {"x": torch.zeros(2)})


def test_directory_is_whole_or_absent(tmp_path):
    target = tmp_path / "step"
    with pytest.raises(RuntimeError), whole_directory(target) as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    # What a kill left behind is not mistaken for the new content.
    (tmp_path / ".step.partial").mkdir()
    (tmp_path / ".step.partial" / "stale").write_text("")
    with whole_directory(target) as partial:
        (partial / "a").write_text("2")
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step"]
    assert [p.name for p in target.iterdir()] == ["a"]


def test_text_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.txt"
    write_text(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["x.txt"]
