from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import EvalResult, ModelCard, metadata_load
from safetensors.torch import load_file

from vitopt.models.checkpoint import open_checkpoint
from vitopt.models.origin import FINETUNE, QUANTIZE, note_origin
from vitopt.ownership import CARD_FILE
from vitopt.records import Record
from vitopt.report.card import write_card, write_card_without_figures

TRAINED = {
    "method": "lora", "rank": 4, "alpha": 32.0, "learning_rate": 1e-3, "batch_size": 16, "images": 720, "classes": 12,
    "epochs": 3.0, "steps": 135, "trainable_parameters": 334092, "parameters": 5717416, "dataset": "owner/flowers",
    "dataset_hub_id": "owner/flowers", "split": "train",
}  # fmt: skip


def test_card_is_markdown_that_is_not_escaped_as_html(make: SimpleNamespace, comparison, tmp_path):
    records = comparison[0]
    record = records[2].model_copy(update={"layer_plan": {"nf4": 72, "bf16": 1}})

    write_card(record, tmp_path, records)

    text = (tmp_path / CARD_FILE).read_text()
    assert metadata_load(tmp_path / CARD_FILE)["library_name"] == "transformers"
    assert "Linear layers: 72 nf4, 1 bf16." in text
    assert "and bitsandbytes installed" in text
    assert 'pipeline("image-classification", "FOLDER"' in text
    assert "fp8 failed: fp8 cannot run on cpu" in text
    assert "&#34;" not in text


def measured(make, tmp_path, **fields):
    """The part of a variant's card above its table, without its heading."""
    record = make.record("a", fields.pop("format", "bf16"), p50_ms={1: 3.0}, **fields)
    write_card(record, tmp_path, [record])
    text = (tmp_path / CARD_FILE).read_text()
    return text, text.split("## Measured")[1].split("| variant |")[0].strip()


def test_card_of_an_expanded_run_is_about_what_the_folder_holds(make: SimpleNamespace, tmp_path):
    text, words = measured(make, tmp_path, stored_format="nf4", layer_plan={"bf16": 73})

    assert "Format: bf16 (stored as nf4)." in text
    assert "and bitsandbytes installed" in text
    assert words.startswith("This folder holds nf4.") and "expanded to bf16 at load" in words


def test_card_names_the_packages_of_the_stored_formats_only(make: SimpleNamespace, tmp_path):
    text, _ = measured(make, tmp_path, format="w8a8", stored_format="nf4", layer_plan={"w8a8": 72, "bf16": 1})

    assert "(and bitsandbytes installed)" in text


def test_card_says_what_the_code_does_without(make: SimpleNamespace, tmp_path):
    _, words = measured(
        make,
        tmp_path,
        asked={"sdpa_kernel": "cudnn"},
        ran={"attention": "sdpa", "sdpa_kernel": "cudnn", "fuse_qkv": True, "compile": True},
    )

    assert "the cudnn kernel, fuse qkv and compile" in words
    assert words.endswith("on Test CPU, batch size 1.")


def test_card_of_a_plain_variant_has_no_such_words(make: SimpleNamespace, tmp_path):
    _, words = measured(make, tmp_path, predictions=make.predictions())

    assert words == "40 images of `shapes`, split test (sha256 000000000000), on Test CPU, batch size 1."


def make_origin(checkpoint: Path, folder: Path, card: str, **trained: object) -> None:
    """The note of a checkpoint that was trained and quantized, starting from one with this model card."""
    (checkpoint / CARD_FILE).write_text(card)
    note_origin(open_checkpoint(str(checkpoint)), checkpoint, FINETUNE, **TRAINED | trained)
    held = {"format": "nf4", "half": "bf16", "skip": ["block.1"], "layers": {}, "layer_plan": {"nf4": 12, "bf16": 7}}
    note_origin(open_checkpoint(str(checkpoint)), folder, QUANTIZE, **held)


def metrics(card: ModelCard) -> dict[str, EvalResult]:
    return {one.metric_type: one for one in card.data.eval_results}


def test_the_hub_reads_the_metadata(make: SimpleNamespace, comparison, tiny_checkpoint, copy_of, tmp_path) -> None:
    records = comparison[0]
    record = records[2].model_copy(update={"layer_plan": {"nf4": 12, "bf16": 7}})
    (tmp_path / "nf4").mkdir()
    base = "license: other\nlicense_name: small\nlicense_link: https://licences.org/small\nbase_model: owner/vit"
    make_origin(copy_of(tiny_checkpoint), tmp_path / "nf4", f"---\n{base}\n---\n")

    write_card(record, tmp_path / "nf4", records)

    card = ModelCard.load(tmp_path / "nf4" / CARD_FILE)
    assert card.data.base_model == "owner/vit" and card.data.base_model_relation == "finetune"
    assert (card.data.license, card.data.license_name) == ("other", "small")
    assert card.data.datasets == ["owner/flowers"]
    assert card.data.pipeline_tag == "image-classification" and {"vitopt", "lora", "nf4"} <= set(card.data.tags)
    top1 = metrics(card)["accuracy"]
    assert top1.metric_value == pytest.approx(record.accuracy.top1_percent / 100)
    assert top1.metric_args["ci95"] == pytest.approx([end / 100 for end in record.accuracy.top1_ci95_percent])
    assert (top1.dataset_type, top1.dataset_name, top1.dataset_split) == ("imagefolder", "shapes", "test")
    assert metrics(card)["agreement"].metric_value == pytest.approx(record.versus_baseline.agreement_percent / 100)
    assert metrics(card)["kl_divergence"].metric_value == pytest.approx(record.versus_baseline.mean_kl_divergence)
    assert metrics(card)["latency_p50_ms"].metric_args == {"calls": 100}  # these records have no interval of it
    assert "LoRA (rank 4" in card.text and "720 images of 12 classes" in card.text and "block.1 kept" in card.text


def test_every_step_of_a_checkpoint_is_told(tiny_checkpoint, copy_of) -> None:
    folder = copy_of(tiny_checkpoint)
    for step in (
        {"step": "prune", "removed_blocks": (3, 5), "units": None, "images": 64},
        {"step": FINETUNE, **TRAINED, "method": "qat", "format": "w8a8", "image_size": 16, "teacher": "larger-vit"},
        {"step": "calibrate", "images": 128},
        {"step": FINETUNE, **TRAINED, "format": "nf4"},
    ):
        note_origin(open_checkpoint(str(folder)), folder, **step)

    write_card_without_figures(folder)

    lines = [line for line in (folder / CARD_FILE).read_text().splitlines() if "(vitopt " in line]
    assert lines[0].startswith("- Step `prune`: removed_blocks 3 5, images 64 (vitopt")
    assert "all weights, as w8a8 holds them at 16 x 16 pixels, distilled from `larger-vit`: 3 epochs" in lines[1]
    assert "observed on 128 images" in lines[2]
    assert "LoRA (rank 4, alpha 32, merged afterwards; trained beside weights packed in nf4): 3 epochs" in lines[3]


def test_what_is_not_known_is_left_out(tiny_checkpoint, copy_of, make: SimpleNamespace, tmp_path) -> None:
    (tmp_path / "nf4").mkdir()
    trained = {"dataset": "flowers", "dataset_hub_id": None, "method": "full"}
    make_origin(copy_of(tiny_checkpoint), tmp_path / "nf4", "# A card without metadata", **trained)
    record = make.record("a", "nf4", p50_ms={1: 3.0})

    write_card(record, tmp_path / "nf4", [record])

    metadata = metadata_load(tmp_path / "nf4" / CARD_FILE)
    assert not {"license", "base_model", "base_model_relation", "datasets", "metrics", "model-index"} & set(metadata)
    text = (tmp_path / "nf4" / CARD_FILE).read_text()
    assert "not stated in its files" in text and "all weights" in text and "rank" not in text


def test_no_local_path_is_in_a_card(make: SimpleNamespace, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    record = make.record("a", "bf16", p50_ms={1: 3.0}, predictions=make.predictions())
    record = record.model_copy(
        update={
            "dataset": record.dataset.model_copy(update={"name": "mine/photos"}),
            "model": record.model.model_copy(update={"source": f"{tmp_path}/secret/vit"}),
            "warnings": ("3 images of mine/photos are in ~/other/train, see ../notes/why.txt; 12 images/s is slow",),
        }
    )
    failed = make.record("b", failure=f"cannot read {tmp_path}/secret/vit/model.safetensors: copy it", model=None)

    write_card(record, tmp_path, [record, failed])

    text = (tmp_path / CARD_FILE).read_text()
    for part in (str(tmp_path), "secret", "mine/", "~", ".."):
        assert part not in text
    assert "3 images of photos are in train, see why.txt; 12 images/s is slow" in text
    assert "cannot read vit/model.safetensors: copy it" in text
    assert metrics(ModelCard.load(tmp_path / CARD_FILE))["accuracy"].dataset_name == "photos"


def test_a_data_set_of_the_hub_is_named_whole(make: SimpleNamespace, tmp_path) -> None:
    record = make.record("a", p50_ms={1: 3.0}, predictions=make.predictions())
    record = record.model_copy(update={"dataset": record.dataset.model_copy(update={"name": "uoft-cs/cifar10"})})

    write_card(record, tmp_path, [record])

    top1 = metrics(ModelCard.load(tmp_path / CARD_FILE))["accuracy"]
    assert (top1.dataset_type, top1.dataset_name) == ("uoft-cs/cifar10", "uoft-cs/cifar10")


def test_a_card_without_figures_says_so_and_how_to_measure(tiny_checkpoint: Path, copy_of) -> None:
    folder = copy_of(tiny_checkpoint)

    write_card_without_figures(folder)

    text = (folder / CARD_FILE).read_text()
    assert "Nothing was measured" in text and "vitopt evaluate FOLDER --data DATA" in text
    assert "32 x 32 pixels, 4 classes" in text and "Format: fp32." in text
    assert 'pipeline("image-classification", "FOLDER")' in text
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert f"{parameters:,} parameters" in text


def test_an_edited_card_stays(make: SimpleNamespace, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    def write(name: str) -> str:
        record: Record = make.record(name, p50_ms={1: 3.0})
        write_card(record, tmp_path, [record])
        return card.read_text()

    card = tmp_path / CARD_FILE
    assert "# first" in write("first")
    assert "# second" in write("second") and not caplog.records
    edited = card.read_text().replace("# second", "# SECOND")  # as long as before
    card.write_text(edited)
    assert write("third") == edited
    assert [record for record in caplog.records if CARD_FILE in record.message and "edited" in record.message]
    card.unlink()
    assert "# third" in write("third")
