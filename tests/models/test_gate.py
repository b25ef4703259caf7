"""A stranger's checkpoint: its code never runs, nothing is asked, and its weights are safetensors of its own folder."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vitopt.checks import plans
from vitopt.errors import CheckpointError, MeasurementError
from vitopt.models import gate, weights
from vitopt.models.checkpoint import empty_model, load_model, load_processor, open_checkpoint
from vitopt.models.weights import INDEX_FILE
from vitopt.optimize.quantize import quantize
from vitopt.prediction import predict
from vitopt.recipe import Recipe, RecipeVariant, VariantSpec

ENTRIES = {
    "AutoConfig": "code.Config",
    "AutoModelForImageClassification": "code.Model",
    "AutoImageProcessor": "code.Processor",
}


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tiny_checkpoint: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A checkpoint folder that the test may change."""
    return copy_of(tiny_checkpoint)


@pytest.fixture
def armed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Code in `folder` that leaves a trace, and `y` on standard input; tells whether either was touched."""
    trace = tmp_path / "it-ran"
    (folder / "code.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig as Config, ViTForImageClassification as Model\n"
        "from transformers import ViTImageProcessor as Processor\n"
    )
    typed = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", typed)
    return lambda: trace.exists() or typed.tell() > 0


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recipe(folder: Path) -> Recipe:
    return Recipe(name="r", model=str(folder), variants=(RecipeVariant(name="fp32", format="fp32"),))


USES: dict[str, Callable[[Path, Path], Any]] = {
    "dry run": lambda folder, tmp: plans(recipe(folder)),
    "quantize": lambda folder, tmp: quantize(
        open_checkpoint(str(folder)), VariantSpec(name="bf16", format="bf16"), tmp / "out", device="cpu"
    ),
    "predict": lambda folder, tmp: list(predict(str(folder), [tmp / "x.png"], top=1, device="cpu")),
}


@pytest.mark.parametrize("use", USES)
def test_code_of_an_unknown_model_type_is_refused_unasked(folder, armed, tmp_path, use):
    change(folder / "config.json", auto_map=ENTRIES, model_type="strange-vit")
    line = one_line(lambda: USES[use](folder, tmp_path))
    assert "'strange-vit'" in line
    assert "auto_map" in line
    assert not armed()


def test_code_of_a_preprocessor_is_refused_unasked(folder, armed):
    for name in ("ViTImageProcessor", "StrangeProcessor", None):
        change(folder / "preprocessor_config.json", auto_map=ENTRIES, image_processor_type=name)
        line = one_line(lambda: load_processor(open_checkpoint(str(folder))))
        assert "preprocessor" in line
        assert "auto_map" in line
        assert not armed()


def test_code_of_a_nested_preprocessor_is_refused_too(folder, armed):
    content = {"image_processor": {"image_processor_type": "StrangeProcessor", "auto_map": ENTRIES}}
    (folder / "processor_config.json").write_text(json.dumps(content))
    assert "auto_map" in one_line(lambda: load_processor(open_checkpoint(str(folder))))
    assert not armed()


def test_a_preprocessor_that_is_no_mapping(folder):
    (folder / "preprocessor_config.json").write_text("[1]")
    assert str(folder) in one_line(lambda: load_processor(open_checkpoint(str(folder))))


def test_code_beside_a_known_model_type_is_left_out(folder, armed, tmp_path, caplog):
    change(folder / "config.json", auto_map=ENTRIES)
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint)
    assert type(model) is transformers.ViTForImageClassification
    assert type(empty_model(checkpoint)) is transformers.ViTForImageClassification
    assert type(load_processor(checkpoint)).__module__.startswith("transformers.")
    quantize(checkpoint, VariantSpec(name="bf16", format="bf16"), tmp_path / "out", device="cpu")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not armed()
    assert [record.message for record in caplog.records if "code of its own" in record.message] == [
        f"{folder} names code of its own, which vitopt never runs: opened as transformers' vit"
    ]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("place", ["vit", "clip"])
def test_a_kernel_of_a_configuration_is_not_fetched(make_family, copy_of, monkeypatch, key, place):
    """transformers fetches an attention by this name from the hub and imports it."""
    folder = copy_of(make_family(place).folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content.get("vision_config", content)[key] = "owner/kernel"
    path.write_text(json.dumps(content))
    asked: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: asked.append(name) or False)
    checkpoint = open_checkpoint(str(folder))
    load_model(checkpoint)
    empty_model(checkpoint)
    assert "owner/kernel" not in asked


def test_weights_of_another_packing_are_refused(folder):
    change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    line = one_line(lambda: open_checkpoint(str(folder)))
    assert "'gptq'" in line
    assert "bitsandbytes and torchao" in line


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_beside_a_model_is_refused(folder, whole):
    """transformers would load its weights too, pickles among them, or another base model."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    if not whole:
        (folder / "config.json").unlink()
    assert "adapter" in one_line(lambda: open_checkpoint(str(folder)))


# weights


@pytest.fixture
def sharded(folder: Path) -> Callable[..., Path]:
    """Divides the weights of `folder` between two files; the head lies where the test says."""

    def divide(head: object = "model-00002-of-00002.safetensors", metadata: bool = True) -> Path:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        first = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
        second = {name: tensor for name, tensor in weights.items() if name.startswith("classifier.")}
        save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
        save_file(second, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
        torch.save(second, folder / "model-00002-of-00002.bin")
        save_file(second, folder.parent / "outside.safetensors", metadata={"format": "pt"})
        weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors") | dict.fromkeys(second, head)
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return divide


def test_weights_in_several_files(sharded, tiny_checkpoint):
    checkpoint = open_checkpoint(str(sharded()))
    assert [file.name for file in checkpoint.weights] == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    expected = load_model(open_checkpoint(str(tiny_checkpoint))).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(checkpoint).state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00002.bin",
        "../outside.safetensors",
        "ABSOLUTE/outside.safetensors",
        "sub/model.safetensors",
        ".safetensors",
        "..safetensors",
        "model-00002-of-00002.safetensors\n",
        "",
        7,
        None,
        ["model-00002-of-00002.safetensors"],
    ],
)
def test_an_index_names_safetensors_of_its_own_folder_only(sharded, folder, name):
    name = name.replace("ABSOLUTE", str(folder.parent)) if isinstance(name, str) else name
    line = one_line(lambda: open_checkpoint(str(sharded(name))))
    assert repr(name) in line
    assert INDEX_FILE in line


def test_a_weight_file_that_is_not_there(sharded):
    line = one_line(lambda: open_checkpoint(str(sharded("model-00009-of-00002.safetensors"))))
    assert "lacks model-00009-of-00002.safetensors" in line


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["model.safetensors"]}'])
def test_a_broken_index(sharded, content):
    folder = sharded()
    (folder / INDEX_FILE).write_text(content)
    line = one_line(lambda: open_checkpoint(str(folder)))
    assert INDEX_FILE in line
    assert "copy" in line


def test_an_index_that_nothing_reads_may_be_stale(folder):
    (folder / INDEX_FILE).write_text('{"weight_map": {"head": "gone.safetensors"}}')
    assert load_model(open_checkpoint(str(folder))) is not None


def test_a_link_that_leaves_the_folder_is_refused(folder):
    outside = (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(outside)
    line = one_line(lambda: open_checkpoint(str(folder)))
    assert str(folder / "model.safetensors") in line
    assert "link" in line


def test_links_within_the_folder_and_to_it_are_fine(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    (tmp_path / "link").symlink_to(folder)
    assert load_model(open_checkpoint(str(tmp_path / "link"))) is not None


def test_a_snapshot_of_the_hubs_cache_links_to_its_own_blobs(folder, tmp_path):
    repository = tmp_path / "models--owner--vit"
    snapshot = repository / "snapshots" / "0a1b2c"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repository / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(repository / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert load_model(open_checkpoint(str(snapshot))) is not None
    (repository / "blobs" / "abc").rename(tmp_path / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../abc")
    assert "link" in one_line(lambda: open_checkpoint(str(snapshot)))


# configurations


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 3}, "not a multiple of num_attention_heads 3"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"image_size": 10**6}, "image_size"),
        ({"image_size": None}, "image_size is None"),
        ({"image_size": 4096, "patch_size": 1}, "16,777,216 patches"),
        ({"patch_size": 64}, "0 patches"),
        ({"patch_size": True}, "patch_size is True"),
        ({"num_channels": 1}, "num_channels is 1, not 3"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"torch_dtype": "os"}, "torch_dtype is 'os'"),
        ({"hidden_act": "os.system"}, "hidden_act"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps"),
        ({"hidden_dropout_prob": 7}, "hidden_dropout_prob"),
        ({"initializer_range": 1e300}, "initializer_range"),
        ({"initializer_range": float("nan")}, "initializer_range"),
        ({"id2label": ["a", "b", "c", "d"]}, "id2label"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"0": "a", "x": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": None}}, "id2label"),
        ({"num_labels": 7}, "num_labels is 7"),
        ({"architectures": ["BeitForImageClassification"]}, "BeitForImageClassification"),
        ({"model_type": "swin"}, "SwinForImageClassification"),
        ({"quantization_config": "nf4"}, "'nf4'"),
        ({"quantization_config": [1]}, "[1]"),
        ({"num_hidden_layers": 2}, "layers.2."),
        ({"hidden_size": 1024}, "lacks weights"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "no weight is packed"),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "?"}}, "no weight is packed"),
    ],
)
def test_a_configuration_of_no_model(folder, changes, words):
    change(folder / "config.json", **changes)
    line = one_line(lambda: load_model(open_checkpoint(str(folder))))
    assert str(folder) in line
    assert words in line


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5_000])
def test_json_that_no_parser_takes(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json is not a valid JSON file" in one_line(lambda: open_checkpoint(str(folder)))


def test_all_mistakes_are_told_at_once(folder):
    change(folder / "config.json", hidden_size=0, num_attention_heads="2", id2label=["a"])
    with pytest.raises(CheckpointError, match=r"3 mistakes in config\.json") as caught:
        open_checkpoint(str(folder))
    assert all(key in str(caught.value) for key in ("hidden_size", "num_attention_heads", "id2label"))


def test_keys_that_would_change_the_answer_or_the_configuration_itself_are_left_out(folder, tiny_checkpoint):
    change(folder / "config.json", return_dict=False, to_dict=7, _commit_hash="x", output_attentions=True)
    pixels = torch.zeros(1, 3, 32, 32)
    expected = load_model(open_checkpoint(str(tiny_checkpoint)))(pixel_values=pixels).logits
    assert torch.equal(load_model(open_checkpoint(str(folder)))(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX_FILE])
def test_pipes_are_not_opened(folder, sharded, name):
    if name == INDEX_FILE:
        sharded()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name.partition(".")[0]):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "source", ["a b/c", "a\nb", "é/ü", "x" * 3_000, "a/" + "x" * 200, "\0", "~nobody", "random:vit-tiny-patch1-4000"]
)
def test_any_text_may_be_asked_for_as_a_checkpoint(source):
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


# preprocessors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_std": [0, 0, 0]}, "image_std"),
        ({"image_std": [float("nan"), 1, 1]}, "image_std"),
        ({"image_std": None}, "image_std is null"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"size": {"height": 64, "width": 64}}, "64 x 64 pixels, and the model takes 32 x 32"),
        ({"size": {"height": -3, "width": 32}}, "size"),
        ({"size": {"height": 10**6, "width": 10**6}}, "size"),
        ({"size": "big"}, "size"),
        ({"size": {"shortest_edge": 32}}, "size"),
        ({"do_resize": False}, "size"),
        ({"resample": 99}, "resample"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"do_normalize": "yes"}, "do_normalize"),
        ({"image_processor_type": "VideoMAEImageProcessor"}, "height, width"),
    ],
)
def test_a_preprocessor_that_makes_no_pixels_for_the_model(folder, changes, words):
    change(folder / "preprocessor_config.json", **changes)
    line = one_line(lambda: load_processor(open_checkpoint(str(folder))))
    assert str(folder) in line
    assert words in line


def test_a_preprocessor_of_another_size_that_the_model_takes(make_family, copy_of):
    folder = copy_of(make_family("dinov2").folder)
    change(folder / "preprocessor_config.json", size={"height": 48, "width": 48})
    assert load_processor(open_checkpoint(str(folder))) is not None


# numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    held = load_file(folder / "model.safetensors")
    held["classifier.bias"][1] = value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    line = one_line(lambda: load_model(open_checkpoint(str(folder))))
    assert "classifier.bias" in line
    assert "infinite" in line


def test_integers_in_place_of_weights(folder):
    held = load_file(folder / "model.safetensors")
    held["classifier.weight"] = held["classifier.weight"].to(torch.int32)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert "classifier.weight as I32" in one_line(lambda: load_model(open_checkpoint(str(folder))))


def test_logits_that_are_not_finite_are_no_prediction(folder, shapes):
    held = load_file(folder / "model.safetensors")
    held["classifier.weight"].fill_(3e38)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MeasurementError, match="not finite"):
        next(predict(str(folder), [shapes / "test" / "circle" / "00.png"], top=1, device="cpu"))


def test_names_that_stand_twice_are_told_apart(folder, shapes):
    change(folder / "config.json", id2label={"0": "crane", "1": "crane", "2": "b", "3": "c"})
    found = list(predict(str(folder), [shapes / "test" / "circle" / "00.png"], top=4, device="cpu"))
    labels = {one["index"]: one["label"] for one in found[0]["classes"]}
    assert labels == {0: "crane (output 0)", 1: "crane (output 1)", 2: "b", 3: "c"}


# any JSON


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_KEYS = ["hidden_size", "image_size", "patch_size", "id2label", "num_labels", "dtype", "mlp_ratio", "vision_config"]
_PIXEL_KEYS = ["size", "crop_size", "image_mean", "image_std", "rescale_factor", "resample", "do_normalize"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=8), _JSON, max_size=6))
def test_any_configuration_is_described_in_lines(content):
    assert all(mistake and "\n" not in mistake for mistake in gate.mistakes_of_config(content))


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.sampled_from(_PIXEL_KEYS), _JSON, max_size=6))
def test_any_preprocessor_passes_or_is_refused(content):
    with contextlib.suppress(CheckpointError):
        gate.check_preprocessor("model", content)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_any_header_is_read_or_refused(tiny_checkpoint, tmp_path_factory, data):
    content = bytearray((tiny_checkpoint / "model.safetensors").read_bytes())
    for at in data.draw(st.lists(st.integers(0, 3_000), min_size=1, max_size=6)):
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError):
        assert all(len(stored.shape) < 9 for stored in weights.read_headers((path,)).values())
