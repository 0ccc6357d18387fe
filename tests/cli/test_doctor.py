import json
import sys

import pytest

from holdfast import native
from holdfast.cli import doctor, main


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    return exit_.value.code


def test_json_has_what_a_bug_report_needs(capsys):
    assert run_cli("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"torch", "cpu", "native", "gpus", "extras", "data"} <= set(report)
    assert report["cpu"]["cores"] >= 1 and report["cpu"]["threads"] >= 1
    assert report["cpu"]["memory_bytes"] > 1 << 28
    assert set(report["native"]) == {"available", "reason", "variant"}


@pytest.mark.skipif(sys.platform != "linux", reason="features are read from /proc/cpuinfo")
def test_features_agree_with_torch():
    import torch

    capability, features = torch.backends.cpu.get_cpu_capability(), doctor.cpu_features()
    if capability in ("AVX2", "AVX512"):
        assert "avx2" in features
    if capability == "AVX512":
        assert "avx512f" in features


def test_native_off_gives_the_reason(monkeypatch, capsys):
    off = {"available": False, "reason": "no compiler when installed", "variant": None}
    monkeypatch.setattr(native, "status", lambda: off)
    assert run_cli("doctor") == 0
    assert "native      off: no compiler when installed" in capsys.readouterr().out


def test_native_on_names_the_variant(monkeypatch, capsys):
    on = {"available": True, "reason": "", "variant": "avx512"}
    monkeypatch.setattr(native, "status", lambda: on)
    assert run_cli("doctor") == 0
    assert "native      on (avx512)\n" in capsys.readouterr().out


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "matplotlib" else "1")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ['matplotlib; extra == "plots"'])
    assert run_cli("doctor") == 0
    assert "extra       plots: lacks matplotlib" in capsys.readouterr().out


def test_data_directory_follows_the_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "none"))
    assert run_cli("doctor") == 0
    assert f"{tmp_path / 'none'} (absent; set HOLDFAST_DATA)" in capsys.readouterr().out
