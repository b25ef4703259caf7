"""Checkpoints to a listening server."""

import os
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from vitopt.data.pixels import Preprocessor
from vitopt.environment import devices
from vitopt.errors import RecipeError
from vitopt.models.checkpoint import load_processor, open_checkpoint
from vitopt.recipe import RunSpec
from vitopt.serve.app import Served, create_app
from vitopt.serve.model import ServedModel
from vitopt.serve.process import Loading
from vitopt.serve.settings import ServeSpec

TOKEN_VARIABLE = "VITOPT_SERVE_TOKEN"


def serve(
    sources: Sequence[str], run: RunSpec, spec: ServeSpec, device: str = "auto", threads: int | None = None
) -> None:
    """Answer until the process is told to end; what was accepted by then is answered.

    Raises:
        CheckpointError: a checkpoint cannot be opened.
        RecipeError: two checkpoints have one name.
    """
    devices.resolve_device(device)
    served: dict[str, Served] = {}
    for source in sources:
        name = Path(source).name
        if name in served:
            raise RecipeError(f"two checkpoints are called {name}: rename the folder of one")
        checkpoint = open_checkpoint(source)
        loading = Loading(source, run.model_dump(exclude_unset=True), device, spec.batch_sizes, threads)
        model = ServedModel(name, loading, spec, checkpoint.image_size)
        independent = checkpoint.config.problem_type == "multi_label_classification"
        served[name] = Served(model, Preprocessor(load_processor(checkpoint)), checkpoint.label_names, independent)
    app = create_app(served, spec, os.environ.get(TOKEN_VARIABLE))
    uvicorn.run(app, host=spec.host, port=spec.port, log_level="warning", access_log=False)
