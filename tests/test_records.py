import json
import math
import re

import pytest

from vitopt.errors import RecordError
from vitopt.records import (
    RECORD_FILE,
    SCHEMA,
    Accuracy,
    ClassAccuracy,
    Dataset,
    Latency,
    Memory,
    Model,
    Record,
    Roofline,
    Size,
    Variant,
    load_record,
    save_record,
)


def full_record() -> Record:
    return Record(
        variant=Variant(
            name="nf4",
            format="nf4",
            half="bf16",
            skip=("block.0",),
            stored_format="nf4",
            asked={"attention": "flash_attention_2", "sdpa_kernel": "cudnn", "compile": True},
            ran={"attention": "sdpa", "sdpa_kernel": "flash", "compile": False},
            reasons={"attention": "FlashAttention-2 needs a CUDA device", "compile": "no compiler"},
        ),
        model=Model(
            source="m",
            architecture="ViT",
            parameters=5,
            image_size=(32, 48),
            classes=4,
            flops_per_image=123_000_000_000,
        ),
        layer_plan={"nf4": 18, "bf16": 1},
        layers={"block.0.query": "bf16"},
        accuracy=Accuracy(
            images=3,
            top1_percent=200 / 3,
            top1_ci95_percent=(20.8, 93.9),
            top5_percent=None,
            expected_calibration_error=0.125,
            classes=(ClassAccuracy(label=0, name="größe", images=3, top1_percent=200 / 3),),
        ),
        latency=(
            Latency(
                batch_size=1,
                iterations=2,
                rounds=1,
                mean_ms=1.5,
                std_ms=None,
                min_ms=1.0,
                p50_ms=1.5,
                p95_ms=None,
                p99_ms=None,
                images_per_second=666.6,
                floor_ms=0.25,
                model_flop_utilisation_percent=12.5,
                peak_bytes=2**30,
                warmup_ms=10.0,
                warmup_iterations=3,
                samples_ms=(1.0, 2.0),
            ),
        ),
        size=Size(weight_bytes=10, disk_bytes=None),
        memory=Memory(peak_bytes=2**40, kind="resident_set", batch_size=1),
        roofline=Roofline(gemm_format="bf16", gemm_flops_per_second=6.5e14, copy_bytes_per_second=4e12),
        environment={"libraries": {"torch": "2.13"}, "gpu": None},
        dataset=Dataset(name="d", split="test", images=3, sha256="00", preprocessor="P", skipped=("bad.png",)),
        warnings=("noisy",),
    )


def test_a_record_survives_storage(tmp_path):
    record = full_record()
    path = save_record(record, tmp_path / "variants" / "nf4")
    assert path == tmp_path / "variants" / "nf4" / RECORD_FILE
    assert load_record(path) == record
    assert load_record(path.parent) == record


def test_stored_records_are_plain_json(tmp_path):
    content = json.loads(save_record(full_record(), tmp_path).read_text())
    assert content["schema"] == SCHEMA
    assert content["model"]["image_size"] == [32, 48]
    assert content["accuracy"]["top5_percent"] is None
    assert content["accuracy"]["classes"][0]["name"] == "größe"
    assert content == full_record().to_json()


def test_a_failed_variant_needs_only_its_name_and_reason(tmp_path):
    variant = Variant(name="fp8", format="fp8")
    save_record(Record(variant=variant, failure="needs CUDA"), tmp_path)
    loaded = load_record(tmp_path)
    assert (loaded.failure, loaded.accuracy, loaded.latency) == ("needs CUDA", None, ())


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="finite number"):
        Size.model_validate({"weight_bytes": math.inf, "disk_bytes": None})
    with pytest.raises(ValueError, match="finite number"):
        Accuracy(
            images=1,
            top1_percent=math.nan,
            top1_ci95_percent=(0, 1),
            top5_percent=None,
            expected_calibration_error=0,
        )
    # Free-form facts about the machine are not worth losing a measurement for: unknown is null.
    path = save_record(Record(variant=full_record().variant, environment={"load": math.nan}), tmp_path)
    assert json.loads(path.read_text())["environment"] == {"load": None}


def test_a_record_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        full_record().failure = "x"


@pytest.mark.parametrize("schema", ["vitopt.record/0", "vitopt.record/3", None, 1])
def test_another_schema_is_refused(tmp_path, schema):
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps(full_record().to_json() | {"schema": schema}))
    with pytest.raises(RecordError) as caught:
        load_record(path)
    assert str(caught.value) == (
        f"{path} has schema {schema!r}, this vitopt reads {SCHEMA!r}: measure again with this version"
    )


def test_a_record_of_the_schema_before_still_loads(tmp_path):
    content = full_record().to_json() | {"schema": "vitopt.record/1"}
    for field in ("asked", "ran", "reasons"):
        del content["variant"][field]
    content["variant"] |= {
        "attention_requested": "flash_attention_2",
        "attention_used": "sdpa",
        "attention_reason": "FlashAttention-2 needs a CUDA device",
        "fused_attentions": 12,
        "compile_requested": True,
        "compile_used": True,
        "autotune": True,
    }
    for field in ("floor_ms", "model_flop_utilisation_percent", "peak_bytes"):
        del content["latency"][0][field]
    del content["model"]["flops_per_image"], content["roofline"]
    (tmp_path / RECORD_FILE).write_text(json.dumps(content))
    variant = load_record(tmp_path).variant
    assert (variant.asked["attention"], variant.ran["attention"]) == ("flash_attention_2", "sdpa")
    assert variant.reasons == {"attention": "FlashAttention-2 needs a CUDA device"}
    assert variant.ran["fuse_qkv"] and variant.ran["compile"] and variant.ran["autotune"]
    assert load_record(tmp_path).roofline is None


def test_what_failed_before_it_ran_has_not_run_in_the_schema_before_either(tmp_path):
    old = {"name": "fp8", "format": "fp8", "attention_requested": "sdpa", "attention_used": None}
    (tmp_path / RECORD_FILE).write_text(json.dumps({"schema": "vitopt.record/1", "variant": old, "failure": "no GPU"}))
    loaded = load_record(tmp_path)
    assert (loaded.variant.ran, loaded.failure) == ({}, "no GPU")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}"])
def test_json_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(RecordError, match=f"has schema None, this vitopt reads {SCHEMA!r}: measure again"):
        load_record(tmp_path)


@pytest.mark.parametrize("content", [b'{"schema": ', b"", b"\xff\xfe{}"])
def test_broken_json_is_refused(tmp_path, content):
    path = tmp_path / RECORD_FILE
    path.write_bytes(content)
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))} is not a JSON record: [^\n]+; measure again$"):
        load_record(path)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(RecordError) as caught:
        load_record(tmp_path)
    assert str(caught.value) == f"no record at {tmp_path}/{RECORD_FILE}: run `vitopt evaluate` or `vitopt run` first"
    with pytest.raises(RecordError, match=f"no record at {tmp_path}/absent: run"):
        load_record(tmp_path / "absent")


def test_incomplete_and_unknown_fields_are_named(tmp_path):
    path = tmp_path / RECORD_FILE
    content = full_record().to_json()
    del content["latency"][0]["p50_ms"]
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError) as caught:
        load_record(path)
    assert str(caught.value) == f"{path} is not a complete record: latency.0.p50_ms: Field required; measure again"
    path.write_text(json.dumps(full_record().to_json() | {"speed": 1}))
    with pytest.raises(RecordError, match="speed: Extra inputs are not permitted"):
        load_record(path)


# Units that end a name, and names that say all by themselves.
_UNITS = ("_ms", "_percent", "_points", "_bytes", "_per_second", "_seconds", "_used", "_requested", "_reason", "_ci95")
_PLAIN = {
    "name", "label", "images", "iterations", "batch_size", "classes", "source", "architecture", "split", "reason",
    "schema", "variant", "failure", "model", "accuracy", "versus_baseline", "latency", "latency_failures",
    "end_to_end", "throughput", "size", "memory", "environment", "dataset", "command", "baseline", "verdict",
    "right_to_wrong", "wrong_to_right", "mcnemar_p", "speedup_vs_baseline", "warmup_iterations",
    "energy_joules_per_image",
}  # fmt: skip


def test_every_field_says_what_it_means():
    schema = Record.model_json_schema(by_alias=True)
    assert schema["properties"]["schema"]["default"] == SCHEMA
    parts = {"Record": schema, **schema["$defs"]}
    assert {"Latency", "Accuracy", "VersusBaseline", "Size", "Memory", "Dataset"} <= set(parts)
    mute = [
        f"{part}.{field}"
        for part, content in parts.items()
        for field, about in content["properties"].items()
        if not (about.get("description") or field.endswith(_UNITS) or field in _PLAIN)
    ]
    assert mute == []
    assert all(content.get("description") for content in parts.values())
