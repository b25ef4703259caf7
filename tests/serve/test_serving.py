"""A real server in a process of its own, with a real model in another."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("fastapi")


def get(url, body=None):
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
        return json.load(answer)


def test_a_served_checkpoint_answers_as_predict_does_survives_its_model_and_ends_on_request(tiny_checkpoint, shapes):
    from vitopt.prediction import predict

    photos = sorted((shapes / "test" / "circle").iterdir())[:3]
    expected = [answer["classes"][0] for answer in predict(str(tiny_checkpoint), photos, top=1)]
    command = [sys.executable, "-m", "vitopt", "serve", str(tiny_checkpoint), "--port", "0", "--batch-sizes", "1,2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = next(line for line in server.stderr if "http://" in line)
            url = line[line.index("http://") :].split()[0]
            for photo, classes in zip(photos, expected, strict=True):
                found = get(f"{url}/predict?top=1", photo.read_bytes())["classes"][0]
                assert (found["label"], found["index"]) == (classes["label"], classes["index"])
                assert found["percent"] == pytest.approx(classes["percent"], abs=1e-3)
            os.kill(get(f"{url}/models")[0]["process"], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while True:
                try:
                    again = get(f"{url}/predict?top=1", photos[0].read_bytes())
                    break
                except urllib.error.HTTPError as error:  # 503 until it is loaded again
                    assert error.code in (500, 503) and time.monotonic() < deadline
                    time.sleep(0.05)
            assert again["classes"][0]["index"] == expected[0]["index"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()
