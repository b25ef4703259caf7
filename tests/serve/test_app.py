import contextlib
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from serve_stand_in import SIZE

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402

from vitopt.serve.app import Served, create_app  # noqa: E402
from vitopt.serve.metrics import Metrics  # noqa: E402
from vitopt.serve.process import Answers  # noqa: E402
from vitopt.serve.settings import ServeSpec  # noqa: E402

LABELS = ["red", "green", "blue"]


def preprocess(image):
    """Mean of each channel, everywhere."""
    means = torch.from_numpy(np.asarray(image, np.float32)).mean((0, 1))
    return means[:, None, None].expand(3, *SIZE) / 100


def photo(colour, size=(8, 6), format="JPEG"):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, format)
    return content.getvalue()


@pytest.fixture
def client(model):
    """Makes a client of a server that runs."""
    open_clients = []

    def make(token=None, names=("fake",), labels=LABELS, **settings):
        spec = ServeSpec(**{"batch_sizes": (1, 2, 4), "queue": 8} | settings)
        metrics = Metrics(spec.batch_sizes)
        served = {name: Served(model(name, metrics, **settings), preprocess, labels) for name in names}
        client = TestClient(create_app(served, spec, metrics, token))
        client.__enter__()
        open_clients.append(client)
        return client

    yield make
    for client in open_clients:
        client.__exit__(None, None, None)


@pytest.mark.parametrize("way", ["body", "form"])
def test_an_image_gets_its_classes(client, way):
    body = photo((250, 10, 40), format="PNG")
    sent = {"content": body} if way == "body" else {"files": {"photo": ("a.png", body)}}
    answer = client().post("/predict?top=2", **sent)
    assert answer.status_code == 200
    found = answer.json()
    assert [one["label"] for one in found["classes"]] == ["red", "blue"]
    expected = 100 * torch.tensor([2.5, 0.1, 0.4]).softmax(0)
    assert found["classes"][0]["percent"] == pytest.approx(float(expected[0]), rel=1e-5)
    assert set(found["milliseconds"]) == {"decode", "wait", "model"} and found["model"] == "fake"


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ({"content": b""}, 400, "no image"),
        ({"content": b"text"}, 400, "not an image"),
        ({"content": photo((0, 0, 0))[:-40]}, 400, "truncated"),
        ({"content": photo((0, 0, 0), size=(200, 100))}, 400, "megapixels"),
        ({"content": b"x" * 5001}, 413, "5,000"),
        ({"content": iter([b"x" * 4000, b"x" * 4000])}, 413, "5,000"),
        ({"files": {"a": ("a", b"x" * 6000)}}, 413, "5,000"),
        ({"files": {"a": ("a", b"")}}, 400, "no image"),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "multipart"),
        ({"content": photo((0, 0, 0)), "params": {"model": "other"}}, 404, "there are fake"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_line(client, sent, status, said):
    one = client(max_bytes=5000, max_pixels=10_000)
    answer = one.post("/predict", **sent)
    assert answer.status_code == status
    assert re.search(said, answer.json()["error"], re.IGNORECASE) and "\n" not in answer.json()["error"]
    assert one.post("/predict", content=photo((0, 200, 0))).json()["classes"][0]["label"] == "green"


@contextlib.contextmanager
def full_queue(client, process, queue):
    """While this is entered as many requests wait as may; all are answered at its end."""
    process.hold.clear()
    with ThreadPoolExecutor(queue) as pool:
        waiting = [pool.submit(client.post, "/predict", content=photo((0, 0, 0))) for _ in range(queue)]
        deadline = time.monotonic() + 10
        while client.get("/metrics").text.count(f'vitopt_requests_waiting{{model="fake"}} {queue:.1f}') == 0:
            assert time.monotonic() < deadline
        try:
            yield
        finally:
            process.hold.set()
        assert [answer.result().status_code for answer in waiting] == [200] * queue


def test_a_full_queue_is_503_with_a_time_to_come_back(client, processes):
    one = client(queue=4)
    with full_queue(one, processes[0], 4):
        refused = one.post("/predict", content=photo((0, 0, 0)))
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert "try again" in refused.json()["error"]


@pytest.mark.parametrize("kind", ["image/jpeg", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/predict", "/v2/models/fake/infer"])
def test_refusals_come_before_the_body_is_read(client, processes, path, kind):
    read = []

    def body():
        read.append(path)
        yield b"x" * 4000

    def answer(**headers):
        return one.post(path, content=body(), headers={"content-type": kind, "content-length": "4000"} | headers)

    one = client(queue=4, max_bytes=5000, token="secret")
    assert answer().status_code == 401
    one.headers["Authorization"] = "Bearer secret"
    assert answer(**{"content-length": "6000"}).status_code == 413
    with full_queue(one, processes[0], 4):
        assert answer().status_code == 503
    assert not read
    assert answer().status_code == 400 and read


def test_no_answer_in_time_is_504(client, processes):
    one = client(timeout_s=0.05)
    processes[0].hold.clear()
    answer = one.post("/predict", content=photo((0, 0, 0)))
    processes[0].hold.set()
    assert answer.status_code == 504 and "0.05 s" in answer.json()["error"]


def test_logits_that_are_not_finite_are_no_class(client, monkeypatch):
    one = client()
    nothing = lambda self, slots, size: Answers(np.full((len(slots), 3), np.nan))  # noqa: E731
    monkeypatch.setattr("serve_stand_in.FakeProcess.answers", nothing)
    answer = one.post("/predict", content=photo((0, 0, 0)))
    assert answer.status_code == 500 and "not finite" in answer.json()["error"]


def test_the_inference_protocol_answers_each_image_in_its_place(client):
    one = client()
    assert one.get("/v2/health/ready").json() == {"ready": True}
    assert one.get("/v2/health/live").status_code == one.get("/v2").status_code == 200
    assert one.get("/v2/models/fake").json()["inputs"][0]["shape"] == [-1, 3, *SIZE]
    assert one.get("/v2/models/other").status_code == 404
    pixels = np.arange(5 * 3 * 4, dtype="float32").reshape(5, 3, *SIZE)
    body = {"inputs": [{"name": "pixel_values", "shape": [5, 3, *SIZE], "datatype": "FP32", "data": pixels.tolist()}]}
    found = one.post("/v2/models/fake/infer", json=body).json()["outputs"][0]
    assert found["shape"] == [5, 3]
    assert np.reshape(found["data"], (5, 3)).tolist() == pixels[:, :, 0, 0].tolist()
    assert one.post("/v2/models/fake/versions/1/infer", json=body).json()["outputs"] == [found]
    refused = one.post("/v2/models/fake/infer", content=b"{}")
    assert refused.status_code == 400 and "inputs" in refused.json()["error"]


def test_a_models_version_is_the_one_that_its_metadata_names(client):
    one = client()
    for path in ("", "/ready"):
        plain = one.get(f"/v2/models/fake{path}")
        assert one.get(f"/v2/models/fake/versions/1{path}").json() == plain.json()
        assert one.get(f"/v2/models/fake/versions/2{path}").status_code == 404
    assert one.get("/v2/models/fake").json()["versions"] == ["1"]


def test_requests_are_divided_among_models(client):
    one = client(names=("a", "b"), ab=True)
    named = [one.post("/predict", content=photo((0, 0, 0))).json()["model"] for _ in range(4)]
    assert named == ["a", "b", "a", "b"]
    assert one.post("/predict?model=b", content=photo((0, 0, 0))).json()["model"] == "b"
    without = client(names=("a", "b"))
    assert {without.post("/predict", content=photo((0, 0, 0))).json()["model"] for _ in range(3)} == {"a"}


def test_a_token_protects_all_but_health(client):
    one = client(token="secret")
    for headers in ({}, {"Authorization": "Bearer other"}):
        for path in ("/metrics", "/models"):
            assert one.get(path, headers=headers).status_code == 401
        assert one.post("/predict", content=photo((0, 0, 0)), headers=headers).status_code == 401
        for path in ("", "/versions/1"):
            assert one.post(f"/v2/models/fake{path}/infer", content=b"{}", headers=headers).status_code == 401
    assert one.get("/v2/health/ready").status_code == 200
    right = {"Authorization": "Bearer secret"}
    assert one.post("/predict", content=photo((0, 0, 0)), headers=right).status_code == 200


def test_metrics_are_what_prometheus_reads(client):
    from prometheus_client.parser import text_string_to_metric_families

    one = client()
    for content in (photo((0, 0, 0)), photo((0, 0, 0)), b"text"):
        one.post("/predict", content=content)
    families = {family.name: family for family in text_string_to_metric_families(one.get("/metrics").text)}
    results = {sample.labels["result"]: sample.value for sample in families["vitopt_requests"].samples}
    assert results == {"answered": 2, "refused": 0, "failed": 1}
    counts = {
        sample.labels["stage"]: sample.value
        for sample in families["vitopt_request_seconds"].samples
        if sample.name.endswith("_count")
    }
    assert counts == dict.fromkeys(("decode", "wait", "model", "all"), 2)


def test_the_page_and_the_list_of_the_interface_are_there(client):
    one = client()
    for path, words in (("/", "Drop an image"), ("/docs", "openapi.json")):
        page = one.get(path)
        assert page.headers["content-type"].startswith("text/html") and words in page.text
        assert "http" not in page.text  # nothing from elsewhere
    paths = one.get("/openapi.json").json()["paths"]
    assert "image/jpeg" in json.dumps(paths["/predict"]) and "/v2/models/{name}/infer" in paths


def test_an_adaptive_model_tells_which_pass_answered(client, processes):
    one = client()
    assert "path" not in one.post("/predict", content=photo((0, 0, 0))).json()
    for taken in ("first", "second"):
        processes[0].paths = [taken] * 4
        assert one.post("/predict", content=photo((0, 0, 0))).json()["path"] == taken


def test_names_that_stand_twice_are_told_apart(client):
    one = client(labels=["crane", "crane", "maillot"])
    found = one.post("/predict?top=3", content=photo((250, 10, 40), format="PNG")).json()["classes"]
    assert [one["label"] for one in found] == ["crane (output 0)", "maillot", "crane (output 1)"]


def test_a_model_is_described_as_a_record_does_and_gives_its_logits(client):
    one = client()
    (described,) = one.get("/models").json()
    assert described["record"]["variant"] == {"name": "fake", "format": "fp32"}
    assert described["batch_ms"] == {"1": 10, "2": 12, "4": 14} and described["labels"] == LABELS
    answer = one.post("/predict?logits=true", content=photo((250, 10, 40), format="PNG")).json()
    assert answer["logits"] == pytest.approx([2.5, 0.1, 0.4])
