"""A client that others wrote, against a server that listens."""

import socket
import threading

import numpy as np
import pytest
from serve_stand_in import SIZE

triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
uvicorn = pytest.importorskip("uvicorn")

from vitopt.serve.app import Served, create_app  # noqa: E402
from vitopt.serve.settings import ServeSpec  # noqa: E402

PIXELS = np.arange(3 * 3 * 4, dtype="float32").reshape(3, 3, *SIZE)
EXPECTED = PIXELS[:, :, 0, 0].tolist()  # of the stand-in


@pytest.fixture
def client(model):
    app = create_app({"fake": Served(model(), None, ["red", "green", "blue"], False)}, ServeSpec(queue=8))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        with triton.InferenceServerClient(f"127.0.0.1:{listening.getsockname()[1]}") as client:
            yield client
        server.should_exit = True
        thread.join(10)


def pixels(binary=True):
    tensor = triton.InferInput("pixel_values", list(PIXELS.shape), "FP32")
    tensor.set_data_from_numpy(PIXELS, binary_data=binary)
    return [tensor]


@pytest.mark.parametrize("version", ["", "1"])
def test_health_and_metadata(client, version):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("fake", version)
    assert not client.is_model_ready("other") and not client.is_model_ready("fake", "2")
    assert client.get_server_metadata()["name"] == "vitopt"
    found = client.get_model_metadata("fake", version)
    assert found["inputs"][0]["shape"] == [-1, 3, *SIZE] and found["outputs"][0]["shape"] == [-1, 3]


@pytest.mark.parametrize("sent", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("wanted", [False, True, None], ids=["as json", "as binary", "as it comes"])
def test_logits_of_pixels(client, sent, wanted):
    outputs = None if wanted is None else [triton.InferRequestedOutput("logits", binary_data=wanted)]
    found = client.infer("fake", pixels(sent), model_version="1", outputs=outputs, request_id="seven")
    assert found.as_numpy("logits").tolist() == EXPECTED
    assert found.get_response()["id"] == "seven"


def test_requests_that_do_not_wait_for_each_other(client):
    under_way = [client.async_infer("fake", pixels()) for _ in range(2)]
    assert [one.get_result().as_numpy("logits").tolist() for one in under_way] == [EXPECTED] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"request_compression_algorithm": "gzip"}, "gzip"),
        ({"outputs": [triton.InferRequestedOutput("logits", class_count=2)]}, "classification"),
        ({"outputs": [triton.InferRequestedOutput("boxes")]}, "one output, logits"),
    ],
)
def test_what_it_may_ask_and_does_not_get(client, options, said):
    with pytest.raises(triton.InferenceServerException, match=said) as error:
        client.infer("fake", pixels(), **options)
    assert error.value.status() == "400"
