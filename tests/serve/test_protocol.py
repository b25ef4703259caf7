import gzip
import json

import numpy as np
import pytest

from vitopt.errors import RecipeError
from vitopt.serve import protocol

SHAPE = (3, 4, 2)


def request(pixels, *, data=None, **changes):
    tensor = {"name": "pixel_values", "shape": list(pixels.shape), "datatype": "FP32", "data": pixels.ravel().tolist()}
    return json.dumps({"inputs": [tensor | changes]} | (data or {})).encode()


def read(body, headers=None, most=8):
    return protocol.read_request(body, headers or {}, SHAPE, most)


def pixels(images=2):
    return np.random.default_rng(0).standard_normal((images, *SHAPE)).astype("float32")


def test_pixels_come_as_json_flat_or_nested():
    values = pixels()
    for data in (values.ravel().tolist(), values.tolist()):
        nested = json.dumps(
            {"inputs": [{"name": "pixel_values", "shape": [2, *SHAPE], "datatype": "FP32", "data": data}]}
        ).encode()
        np.testing.assert_array_equal(read(nested).pixels, values)


def test_pixels_come_as_bytes_behind_the_json():
    values = pixels()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "pixel_values",
                    "shape": [2, *SHAPE],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": values.nbytes},
                }
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()
    asked = read(head + values.tobytes(), {"Inference-Header-Content-Length": str(len(head))})
    np.testing.assert_array_equal(asked.pixels, values)
    logits = pixels()[:, 0, 0]
    body, headers = protocol.write_response("m", asked, logits)
    split = int(headers["Inference-Header-Content-Length"])
    answer = json.loads(body[:split])["outputs"][0]
    assert answer["shape"] == list(logits.shape) and answer["parameters"] == {"binary_data_size": logits.nbytes}
    np.testing.assert_array_equal(np.frombuffer(body[split:], "<f4").reshape(logits.shape), logits)


def test_an_answer_is_json_unless_bytes_are_wanted():
    asked = read(request(pixels(1), data={"id": "seven"}))
    body, headers = protocol.write_response("m", asked, np.array([[1.5, -2.0]], "float32"))
    answer = json.loads(body)
    assert headers == {"Content-Type": "application/json"}
    assert answer["id"] == "seven" and answer["model_name"] == "m"
    assert answer["outputs"][0]["data"] == [1.5, -2.0] and answer["outputs"][0]["shape"] == [1, 2]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "Open Inference Protocol"),
        (b"[]", "Open Inference Protocol"),
        (json.dumps({"inputs": []}).encode(), "pixel_values, FP32"),
        (request(pixels(), name="image"), "pixel_values, FP32"),
        (request(pixels(), datatype="INT8"), "pixel_values, FP32"),
        (request(pixels(), shape=[2, 3, 2, 4]), "this model takes"),
        (request(pixels(), shape=[2]), "this model takes"),
        (request(pixels(9)), "1 to 8 images"),
        (request(pixels(0)), "1 to 8 images"),
        (request(pixels(), data={"outputs": [{"name": "boxes"}]}), "one output"),
        (
            request(pixels(), data={"outputs": [{"name": "logits", "parameters": {"classification": 3}}]}),
            "classification",
        ),
        (request(pixels(), shape=[1, *SHAPE]), "does not fill"),
        (request(pixels(), shape=[2, *SHAPE]).replace(b"0.", b'"a",', 1), "does not fill"),
        (request(pixels() * np.inf).replace(b"-Infinity", b"1e999").replace(b"Infinity", b"1e999"), "finite"),
    ],
)
def test_a_body_that_does_not_fit_is_one_line(body, said):
    with pytest.raises(RecipeError, match=said) as error:
        read(body)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", ["x", "-1", "100000"])
def test_a_wrong_length_of_the_json_is_named(length):
    with pytest.raises(RecipeError, match="Inference-Header-Content-Length"):
        read(request(pixels()), {"Inference-Header-Content-Length": length})


def test_a_compressed_body_is_named():
    with pytest.raises(RecipeError, match="gzip"):
        read(gzip.compress(request(pixels())), {"Content-Encoding": "gzip"})


def test_bytes_of_another_length_are_named():
    head = request(pixels(), data={}, parameters={"binary_data_size": 5})
    with pytest.raises(RecipeError, match="binary_data_size is 5"):
        read(head + b"1234", {"Inference-Header-Content-Length": str(len(head))})
