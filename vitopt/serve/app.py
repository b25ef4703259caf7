"""The HTTP side: bodies to pixels, answers to JSON. FastAPI and uvicorn do the protocol; nothing here computes.

`/predict` takes a photo; `/v2` is the Open Inference Protocol, which takes pixels
(https://github.com/open-inference/open-inference-protocol); `/metrics` is for Prometheus; `/docs` lists it all.
"""

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteError

from vitopt import __version__
from vitopt.data.decoding import decoded, open_bytes
from vitopt.data.pixels import smallest_side
from vitopt.errors import BadImageError, MeasurementError, RecipeError, UnsupportedError
from vitopt.measure.runnable import Preprocess
from vitopt.prediction import distinct, ranked
from vitopt.records import Outputs
from vitopt.serve import protocol
from vitopt.serve.metrics import CONTENT_TYPE, Metrics
from vitopt.serve.model import Answer, Busy, ServedModel
from vitopt.serve.process import ModelLost
from vitopt.serve.settings import ServeSpec

_PAGES = Path(__file__).parent
_TOP = 5


class Served:
    """A model with what turns photos into its pixels and its logits into names."""

    def __init__(self, model: ServedModel, preprocess: Preprocess, labels: Sequence[str]) -> None:
        self.model, self.preprocess, self.labels = model, preprocess, labels
        self._names = distinct(labels)

    @property
    def outputs(self) -> Outputs:
        """What they are, once the model is loaded."""
        return self.model.runs.outputs if self.model.runs else "classes"

    def fill(self, content: bytes, max_pixels: int) -> Callable[[np.ndarray], None]:
        """What writes the pixels of an encoded image."""

        def write(pixels: np.ndarray) -> None:
            image = decoded(lambda: open_bytes(content), max_pixels, smallest_side=smallest_side(self.preprocess))
            pixels[:] = self.preprocess(image).numpy()

        return write

    def classes(self, logits: np.ndarray, top: int) -> list[dict[str, Any]]:
        """The `top` classes, best first: label, index and percent."""
        return ranked(torch.from_numpy(logits)[None], self._names, self.outputs, top)[0]

    def describe(self) -> dict[str, Any]:
        """What is known of it, as JSON: how it runs, its classes, and what a record says of it."""
        runs = self.model.runs
        return {
            "name": self.model.name,
            "ready": self.model.is_ready,
            "process": self.model.process_id,
            "batch_ms": self.model.batch_ms,
            "load_s": self.model.load_s,
            "outputs": self.outputs,
            "preprocessor": getattr(self.preprocess, "name", type(self.preprocess).__name__),
            "labels": self.labels,
            "record": runs.record if runs else {},
        }


@contextlib.asynccontextmanager
async def running(served: Mapping[str, Served]) -> AsyncIterator[None]:
    """While this is entered the models answer; at its end those requests that they accepted are answered.

    Raises:
        VitoptError: a model cannot be loaded.
    """
    async with contextlib.AsyncExitStack() as started:
        for one in served.values():
            started.push_async_callback(one.model.stop)
            try:
                await one.model.start()
            except ModelLost as error:
                raise UnsupportedError(
                    f"the process of {one.model.name} ended while it loaded: is there memory for --batch-sizes?"
                ) from error
        yield


def create_app(served: Mapping[str, Served], spec: ServeSpec, metrics: Metrics, token: str | None = None) -> FastAPI:
    """The application, whose life is that of its models (`running`)."""
    turns = itertools.cycle(served)

    bearer = HTTPBearer(auto_error=False)

    async def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if token is not None and (given is None or not secrets.compare_digest(given.credentials, token)):
            raise HTTPException(401, "this server wants its bearer token", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="vitopt", version=__version__, lifespan=lambda _: running(served), docs_url=None, redoc_url=None
    )
    protected = [Depends(authorised)]

    def named(name: str | None) -> Served:
        if name is None:
            name = next(turns) if spec.ab else next(iter(served))
        if name not in served:
            raise HTTPException(404, f"no model {name} here; there are {', '.join(served)}")
        return served[name]

    def with_room(name: str | None) -> Served:
        """Asked before a request's body is read: nobody uploads what is refused then."""
        one = named(name)
        one.model.require_room()
        return one

    async def answer(one: Served, fill: Callable[[np.ndarray], None]) -> Answer:
        try:
            return await one.model.classify(fill)
        except BadImageError as error:
            raise HTTPException(400, f"the image cannot be decoded: {error}") from error
        except ModelLost as error:
            raise HTTPException(500, "the model's process ended while it computed this answer: try again") from error
        except MeasurementError as error:
            raise HTTPException(500, f"the model failed: {error}") from error
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {spec.timeout_s:g} s") from error

    @app.post("/predict", dependencies=protected, openapi_extra=protocol.IMAGE_BODY)
    async def predict(
        request: Request,
        model: Annotated[str | None, Query(description="one of several models; else the first, or in turn")] = None,
        top: Annotated[int, Query(ge=1, description="classes, best first")] = _TOP,
        logits: Annotated[bool, Query(description="all logits too")] = False,
    ) -> dict[str, Any]:
        """Classes of one image: its bytes as the body, or as a multipart form's first file."""
        one = with_room(model)
        content = await image_of(request, spec.max_bytes)
        found = await answer(one, one.fill(content, spec.max_pixels))
        refuse_broken(found.logits)
        more: dict[str, Any] = {"path": found.path} if found.path else {}
        if logits:
            more["logits"] = found.logits.tolist()
        return more | {
            "model": one.model.name,
            "classes": one.classes(found.logits, top),
            "milliseconds": {"decode": found.decode_ms, "wait": found.wait_ms, "model": found.model_ms},
            "batch": found.batch,
        }

    @app.get("/v2")
    def server() -> dict[str, Any]:
        """Open Inference Protocol: who answers."""
        return {"name": "vitopt", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    def live() -> dict[str, bool]:
        """Whether the server runs."""
        return {"live": True}

    @app.get("/v2/health/ready")
    def ready(response: Response) -> dict[str, bool]:
        """Whether all models are loaded and warm; 503 until then."""
        return _ready(all(one.model.is_ready for one in served.values()), response)

    @app.get("/v2/models/{name}")
    @app.get(f"/v2/models/{{name}}/versions/{protocol.VERSION}", include_in_schema=False)
    def metadata(name: str) -> dict[str, Any]:
        """What a model takes and gives."""
        one = named(name)
        return protocol.metadata(name, one.model.image_shape, len(one.labels))

    @app.get("/v2/models/{name}/ready")
    @app.get(f"/v2/models/{{name}}/versions/{protocol.VERSION}/ready", include_in_schema=False)
    def model_ready(name: str, response: Response) -> dict[str, bool]:
        """Whether this model is loaded and warm."""
        return _ready(named(name).model.is_ready, response)

    @app.post("/v2/models/{name}/infer", dependencies=protected)
    @app.post(f"/v2/models/{{name}}/versions/{protocol.VERSION}/infer", dependencies=protected, include_in_schema=False)
    async def infer(name: str, request: Request) -> Response:
        """Logits of pixels that the caller prepared: pixel_values, FP32, (images, 3, height, width)."""
        one = with_room(name)
        body = await _body(request, spec.max_bytes)
        try:
            asked = protocol.read_request(body, request.headers, one.model.image_shape, spec.queue)
        except RecipeError as error:
            raise HTTPException(400, str(error)) from error
        tasks = [asyncio.create_task(answer(one, _copy(image))) for image in asked.pixels]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one fails, the others would be for nobody
                task.cancel()
        content, headers = protocol.write_response(name, asked, np.stack([found.logits for found in answers]))
        return Response(content, media_type=headers.pop("Content-Type"), headers=headers)

    @app.get("/metrics", dependencies=protected)
    def counts() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse((_PAGES / "page.html").read_text(encoding="utf-8"))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        # FastAPI's own page is empty where the network that its scripts come from cannot be reached.
        return HTMLResponse((_PAGES / "docs.html").read_text(encoding="utf-8"))

    @app.get("/models", dependencies=protected)
    def models() -> list[dict[str, Any]]:
        """The models here and how they run."""
        return [one.describe() for one in served.values()]

    @app.exception_handler(StarletteError)
    async def one_line(_: Request, error: StarletteError) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 503, headers={"Retry-After": str(error.retry_after_s)})

    return app


def refuse_broken(logits: np.ndarray) -> None:
    """JSON has no NaN, and a class of broken logits would be a lie."""
    if not np.isfinite(logits).all():
        raise HTTPException(500, "the model's logits are not finite: its weights are broken or overflow")


async def image_of(request: Request, max_bytes: int) -> bytes:
    """The bytes of a request's image.

    Raises:
        HTTPException: 400 without an image, 413 for more than `max_bytes`.
    """
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        if not request.headers.get("content-length", "").isdigit():
            raise HTTPException(411, "a form must say its Content-Length")
        _refuse_large(request, max_bytes)
        async with request.form(max_files=1, max_fields=8) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            content = await files[0].read() if files else b""
    else:
        content = await _body(request, max_bytes)
    if not content:
        raise HTTPException(400, "no image: send its bytes as the body, or as a file of a form")
    return content


def _refuse_large(request: Request, max_bytes: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise HTTPException(413, f"{int(length):,} bytes, more than the {max_bytes:,} that are read")


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    _refuse_large(request, max_bytes)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise HTTPException(413, f"more than the {max_bytes:,} bytes that are read")
    return bytes(content)


def _copy(image: np.ndarray) -> Callable[[np.ndarray], None]:
    def write(pixels: np.ndarray) -> None:
        pixels[:] = image

    return write


def _ready(whether: bool, response: Response) -> dict[str, bool]:
    response.status_code = 200 if whether else 503
    return {"ready": whether}
