"""`vitopt run`: what is told of an exported checkpoint."""

from pathlib import Path

import pytest
from commands import done

from vitopt import pipeline
from vitopt.records import Record, Variant


@pytest.mark.parametrize(("engine", "told"), [("openvino", "export/README.md"), ("torch", "plain transformers")])
def test_the_exported_variant_is_told_how_it_runs(
    engine: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(
        variant=Variant(name="best", format="w8a8", ran={"engine": engine, "attention": "sdpa"}), environment={}
    )
    result = pipeline.RunResult(tmp_path, [record], None, tmp_path / "report.html", record)
    monkeypatch.setattr(pipeline, "run", lambda *_: result)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: r\nmodel: vit-quickstart\nvariants:\n- {name: best, format: fp32}\n")
    said = done("run", recipe).stdout
    assert told in said and ("plain transformers" in said) is (engine == "torch")
