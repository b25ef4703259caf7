"""Commands called as a user calls them, and what they print."""

import json
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from vitopt.cli import app


def vitopt(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = vitopt(*arguments)
    assert result.exit_code == 0, result.output
    return result


def printed(*arguments: object) -> Any:
    """The JSON that is all of standard output."""
    return json.loads(done(*arguments, "--json").stdout)


def refusal(*arguments: object) -> str:
    """The one error line (with the mistakes below it) of a command that refuses its input."""
    result = vitopt(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    before, *rest = result.stderr.split("error: ")
    assert len(rest) == 1 and all(line.startswith("note: ") for line in before.splitlines()), result.stderr
    return rest[0].rstrip()
