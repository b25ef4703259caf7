"""Checkpoints to a listening server."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from vitopt.data.pixels import Preprocessor
from vitopt.environment import devices
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.models.checkpoint import load_processor, open_checkpoint
from vitopt.recipe import RunSpec
from vitopt.serve.app import Served, create_app, running
from vitopt.serve.metrics import Metrics
from vitopt.serve.model import ServedModel
from vitopt.serve.process import Loading
from vitopt.serve.settings import TOKEN_VARIABLE, ServeSpec


def serve(
    sources: Sequence[str],
    run: RunSpec,
    spec: ServeSpec,
    device: str = "auto",
    threads: int | None = None,
    *,
    announce: Callable[[str], None],
) -> None:
    """Answer until the process is told to end; what was accepted by then is answered.

    `announce` is told the address as soon as all models are warm.

    Raises:
        CheckpointError: a checkpoint cannot be opened.
        RecipeError: two checkpoints have one name.
        UnsupportedError: the port is taken, the host is none of this machine's, there is no memory for `queue` images,
            or a model's process ends while it loads.
    """
    devices.resolve_device(device)
    served: dict[str, Served] = {}
    metrics = Metrics(spec.batch_sizes)
    for source in sources:
        name = Path(source).name
        if name in served:
            raise RecipeError(f"two checkpoints are called {name}: rename the folder of one")
        checkpoint = open_checkpoint(source)
        loading = Loading(source, run.model_dump(exclude_unset=True), device, spec.batch_sizes, threads)
        model = ServedModel(name, loading, spec, checkpoint.image_size, metrics)
        preprocess = Preprocessor(load_processor(checkpoint), scaled=run.scaled_decoding)
        served[name] = Served(model, preprocess, checkpoint.label_names)
    app = create_app(served, spec, metrics, os.environ.get(TOKEN_VARIABLE))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal that ended it once more
        asyncio.run(_serve(served, app, spec, announce))


async def _serve(served: dict[str, Served], app: FastAPI, spec: ServeSpec, announce: Callable[[str], None]) -> None:
    with _socket(spec) as listening:
        async with running(served):
            announce(f"http://{spec.host}:{listening.getsockname()[1]}")
            config = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False)
            await uvicorn.Server(config).serve([listening])


def _socket(spec: ServeSpec) -> socket.socket:
    """Bound before the models are loaded, which takes minutes: a port that is taken is told at once."""
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    try:
        return socket.create_server((spec.host, spec.port), family=family)
    except OSError as error:
        option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        place = f"{spec.host}:{spec.port}"
        raise UnsupportedError(f"cannot listen at {place} ({error.strerror}): choose another {option}") from error
