import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from holdfast.checks import tinylm
from holdfast.cli import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tinylm.trained().save_pretrained(path)
    return str(path)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_the_command_serves_until_it_is_told_to_end(directory):
    port = free_port()
    command = [sys.executable, "-m", "holdfast", "serve", directory, "--context-budget", "1MiB",
               "--port", str(port), "--tokenizer", "bytes", "--name", "tiny", "--form", "int8",
               "--policy", "sinks_recent", "--option", "sinks=2"]  # fmt: skip
    environment = os.environ | {"HOLDFAST_TOKEN": "secret"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
        body = {"model": "tiny", "prompt": "import ", "max_tokens": 5}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30,
                            headers={"Authorization": "Bearer secret"})  # fmt: skip
        assert answer.json()["usage"]["completion_tokens"] == 5
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "serving tiny at" in log and "1.00 MiB of context" in log
    assert re.search(r'"path": "/v1/completions", "status": 401', log) and "Traceback" not in log


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--host", "0.0.0.0"], 2, "lets other machines in; set a token"),
        (["--host", "example.org"], 2, "lets other machines in; set a token"),
        (["--waiting", "-1"], 2, "0 or more requests may wait"),
        (["--policy", "sink"], 2, "unknown cache policy 'sink'"),
        (["--context-budget", "10KiB"], 3, "one request needs"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(directory, capsys, monkeypatch, options, code,
                                               message):  # fmt: skip
    monkeypatch.delenv("HOLDFAST_TOKEN", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["serve", directory, "--context-budget", "1MiB", "--tokenizer", "bytes", *options])
    assert caught.value.code == code
    assert message in capsys.readouterr().err
