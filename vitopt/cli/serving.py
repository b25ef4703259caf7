"""`vitopt serve`."""

from typing import Annotated

import typer

from vitopt.cli.common import DeviceOption, ThreadsOption, start
from vitopt.cli.options import from_fields
from vitopt.cli.printing import say
from vitopt.errors import UnsupportedError
from vitopt.run_spec import RunSpec
from vitopt.serve.settings import ServeSpec


@from_fields()
def serve(
    *,
    checkpoints: Annotated[list[str], typer.Argument(help="One or more checkpoints, each by the name of its folder.")],
    settings: ServeSpec,
    run: RunSpec,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Answer images over HTTP, gathered into batches."""
    start(as_json=True)
    from vitopt.environment import support

    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if not support.installed(name)]:
        raise UnsupportedError(f"serving needs {', '.join(missing)}: pip install 'vitopt[serve]'")
    from vitopt.serve.server import serve

    say(f"loading {', '.join(checkpoints)}")
    serve(checkpoints, run, settings, device, threads, announce=lambda url: say(f"answering at {url} (see {url}/docs)"))
