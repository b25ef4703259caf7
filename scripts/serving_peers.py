"""Servers that `scripts/serving_comparison.py` holds `vitopt serve` against; they know nothing of vitopt.

    python scripts/serving_peers.py plain CHECKPOINT --port 8001 [--dtype bfloat16]
    python scripts/serving_peers.py ray CHECKPOINT --port 8002 [--dtype bfloat16] [--compile] [--batch-sizes 1,2,4,8]

`plain` is what is written first: FastAPI, one image, one call. `ray` is Ray Serve (`pip install 'ray[serve]'`) with
`@serve.batch`, decoding in threads beside the model and the same compiled batches. It is the peer because LitServe
decodes a batch in the loop that then runs it, and BentoML hands pixels that are decoded beside its model over by HTTP.
"""

import argparse
import asyncio
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

_QUEUE = 64  # requests that may wait, as in `vitopt serve`
_DECODERS = 2


class Classifier:
    """A checkpoint in plain transformers."""

    def __init__(self, checkpoint: str, dtype: str, compiled: bool = False, sizes: tuple[int, ...] = (1,)) -> None:
        self._processor = AutoImageProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=dtype).eval()
        self.labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        self._dtype, self._sizes = model.dtype, sizes
        self._model = torch.compile(model, dynamic=False) if compiled else model
        size = self._processor.size
        for images in sizes:
            self.classify([torch.zeros(3, size["height"], size["width"])] * images)

    def pixels(self, content: bytes) -> torch.Tensor:
        """(3, height, width) of an encoded image."""
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return self._processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def classify(self, images: list[torch.Tensor]) -> list[int]:
        """The class of each image, in one call of the smallest size that holds them."""
        size = next(size for size in self._sizes if size >= len(images))
        batch = torch.stack([*images, *[images[-1]] * (size - len(images))]).to(self._dtype)
        return self._model(batch).logits[: len(images)].argmax(1).tolist()


def answer(index: int, batch: int) -> dict[str, Any]:
    return {"classes": [{"index": index}], "batch": batch}


def about(name: str, labels: list[str]) -> dict[str, Any]:
    """What a client asks before it sends images: answers by path."""
    models = [{"name": name, "ready": True, "process": os.getpid(), "runs": {}, "labels": labels}]
    return {"/v2/health/ready": {"ready": True}, "/models": models}


def plain(arguments: argparse.Namespace) -> None:
    """One request after the other."""
    app = plain_app(Classifier(arguments.checkpoint, arguments.dtype, arguments.compile))
    uvicorn.run(app, port=arguments.port, log_level="warning", access_log=False)


def plain_app(classifier: Classifier) -> FastAPI:
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        return answer(classifier.classify([classifier.pixels(await request.body())])[0], 1)

    for path, content in about("plain", classifier.labels).items():
        app.get(path)(lambda content=content: JSONResponse(content))
    return app


def ray(arguments: argparse.Namespace) -> None:
    """Ray Serve: requests are gathered, and decoded meanwhile."""
    import ray as cluster
    from ray import serve

    sizes = tuple(int(size) for size in arguments.batch_sizes.split(","))

    @serve.deployment(max_ongoing_requests=_QUEUE, max_queued_requests=_QUEUE, ray_actor_options={"num_cpus": 1})
    class Served:
        def __init__(self) -> None:
            torch.set_num_threads(os.cpu_count() or 1)  # Ray gives an actor one
            self._classifier = Classifier(arguments.checkpoint, arguments.dtype, arguments.compile, sizes)
            self._about = about("ray", self._classifier.labels)
            self._decoders, self._caller = ThreadPoolExecutor(_DECODERS), ThreadPoolExecutor(1)

        async def __call__(self, request: Request) -> Any:
            if request.url.path != "/predict":
                return self._about[request.url.path]
            content, loop = await request.body(), asyncio.get_running_loop()
            return await self._answer(await loop.run_in_executor(self._decoders, self._classifier.pixels, content))

        @serve.batch(max_batch_size=sizes[-1], batch_wait_timeout_s=arguments.wait_ms / 1e3)
        async def _answer(self, images: list[torch.Tensor]) -> list[dict[str, Any]]:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._caller, self._classifier.classify, images)
            return [answer(index, len(images)) for index in found]

    cluster.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(Served.bind(), blocking=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", choices=("plain", "ray"))
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-sizes", default="1,2,4,8")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="for more images, although a call could begin")
    arguments = parser.parse_args()
    {"plain": plain, "ray": ray}[arguments.server](arguments)


if __name__ == "__main__":
    main()
