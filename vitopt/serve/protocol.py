"""The Open Inference Protocol's bodies: JSON, and tensors as bytes behind it, as Triton's clients send them.

https://github.com/open-inference/open-inference-protocol, and its extension binary_tensor_data
(https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitopt.errors import RecipeError

INPUT, OUTPUT, VERSION = "pixel_values", "logits", "1"
_JSON_LENGTH = "Inference-Header-Content-Length"
_FLOATS = np.dtype("<f4")

# What /docs shows of a body that is read as it comes.
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


class _Tensor(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    shape: list[int] = Field(default_factory=list)
    datatype: str = ""
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    inputs: list[_Tensor]
    outputs: list[_Tensor] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """`pixels`: (images, 3, height, width), float32; whether the answer's tensor is wanted as bytes."""

    pixels: np.ndarray
    id: str | None
    binary: bool


def metadata(name: str, shape: tuple[int, ...], outputs: int) -> dict[str, Any]:
    """What a model takes and gives; -1 is any number of images. `shape`: (3, height, width)."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "vitopt",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *shape]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, outputs]}],
    }


def read_request(body: bytes, headers: Mapping[str, str], shape: tuple[int, ...], most: int) -> Asked:
    """The pixels of a request. `most`: images that one request may hold.

    Raises:
        RecipeError: it is malformed, or its tensor is not what the model takes; the message says what it must be.
    """
    if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
        raise RecipeError(f"the body is compressed ({encoding}): send it as it is")
    length = headers.get(_JSON_LENGTH)
    if length is not None and not (length.isdigit() and int(length) <= len(body)):
        raise RecipeError(f"the header {_JSON_LENGTH} must be the length of the JSON part of the body")
    split = len(body) if length is None else int(length)
    try:
        request = _Request.model_validate_json(body[:split])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise RecipeError(f"no request of the Open Inference Protocol: {place}: {first['msg']}") from error
    wanted = f"one input {INPUT}, FP32, [images, {', '.join(map(str, shape))}]"
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT or request.inputs[0].datatype != "FP32":
        raise RecipeError(f"this model takes {wanted}")
    tensor = request.inputs[0]
    if len(tensor.shape) != 4 or tuple(tensor.shape[1:]) != shape or not 1 <= tensor.shape[0] <= most:
        raise RecipeError(f"shape {tensor.shape}: this model takes {wanted}, and 1 to {most} images in a request")
    if any(output.name != OUTPUT for output in request.outputs):
        raise RecipeError(f"this model has one output, {OUTPUT}")
    if any("classification" in output.parameters for output in request.outputs):
        raise RecipeError("this model gives logits and ranks no classes: leave the parameter classification out")
    try:
        if (size := tensor.parameters.get("binary_data_size")) is not None:
            if size != len(body) - split:
                raise RecipeError(f"binary_data_size is {size}, and {len(body) - split} bytes follow the JSON")
            values = np.frombuffer(body, _FLOATS, offset=split)
        else:
            values = np.asarray(tensor.data, dtype=_FLOATS)
        pixels = values.reshape(tensor.shape)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"the data of {INPUT} does not fill its shape {tensor.shape} with numbers") from error
    if not np.isfinite(pixels).all():
        raise RecipeError(f"the data of {INPUT} holds values that are not finite")
    binary = request.parameters.get("binary_data_output", False)
    if request.outputs:
        binary = request.outputs[0].parameters.get("binary_data", binary)
    return Asked(pixels, request.id, bool(binary))


def write_response(name: str, asked: Asked, logits: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer; `logits`: (images, outputs)."""
    values = np.ascontiguousarray(logits, dtype=_FLOATS)
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(values.shape)}
    answer: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": [output]}
    answer |= {"id": asked.id} if asked.id else {}
    if not asked.binary:
        output["data"] = values.ravel().tolist()
        return json.dumps(answer, allow_nan=False).encode(), {"Content-Type": "application/json"}
    output["parameters"] = {"binary_data_size": values.nbytes}
    text = json.dumps(answer).encode()
    return text + values.tobytes(), {"Content-Type": "application/octet-stream", _JSON_LENGTH: str(len(text))}
