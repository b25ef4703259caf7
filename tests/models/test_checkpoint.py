import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, Dinov2Config, SiglipConfig

from vitopt import storage
from vitopt.errors import CheckpointError, StorageError
from vitopt.models import checkpoint as module
from vitopt.models.checkpoint import (
    Checkpoint,
    built_in_path,
    disk_bytes,
    empty_model,
    load_model,
    load_processor,
    open_checkpoint,
    parameter_count,
    save_checkpoint,
    weight_bytes,
)
from vitopt.optimize.quantize import quantize
from vitopt.recipe import VariantSpec

CLASSES = ["circle", "cross", "square", "stripe"]

# The tiny ViT by hand: 64 wide, MLP of 128, 3 blocks, 16 patches of 8 x 8 x 3 and a class token, 4 classes.
IN_LINEARS = 3 * (4 * 64 * 64 + 2 * 64 * 128)
LINEAR_ROWS = 3 * (4 * 64 + 128 + 64)
NORMS = 3 * 2 * 2 * 64 + 2 * 64
EMBEDDINGS = 64 + 17 * 64 + 64 * 192 + 64
HEAD = 4 * 64 + 4
PARAMETERS = IN_LINEARS + LINEAR_ROWS + NORMS + EMBEDDINGS + HEAD


@pytest.fixture
def folder(tiny_checkpoint: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A checkpoint folder that the test may change."""
    return copy_of(tiny_checkpoint)


@pytest.fixture(scope="session")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The tiny checkpoint in a format, made once."""
    made: dict[str, Checkpoint] = {}

    def make(format: str) -> Checkpoint:
        if format not in made:
            output = tmp_path_factory.mktemp("quantized") / format
            variant = VariantSpec(name=format, format=format)
            quantize(open_checkpoint(str(tiny_checkpoint)), variant, output, device="cpu")
            made[format] = open_checkpoint(str(output))
        return made[format]

    return make


def change_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def refusal(source: object, **options: object) -> str:
    """The one line that opening `source` is refused with."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(source), **options)
    return one_line(caught.value)


def load_refusal(source: object, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(str(source)), **options)
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    assert len(str(error)) < 500
    return str(error)


# open


def test_a_folder(tiny_checkpoint):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.folder == tiny_checkpoint
    assert checkpoint.weights == (tiny_checkpoint / "model.safetensors",)
    assert checkpoint.image_size == (32, 32)
    assert checkpoint.label_names == CLASSES
    assert (checkpoint.is_random, checkpoint.is_quantized) == (False, False)


def test_a_home_folder_is_expanded(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    assert open_checkpoint(f"~/{tiny_checkpoint.name}").label_names == CLASSES


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "~/absent", "a/b/c"])
def test_a_missing_folder(source):
    assert refusal(source) == f"no checkpoint at {source}: the folder does not exist"


def test_a_file(tiny_checkpoint):
    source = tiny_checkpoint / "model.safetensors"
    assert refusal(source) == f"{source} is a file; a checkpoint is a folder with config.json and model.safetensors"


def test_a_folder_without_a_configuration(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder} has no config.json, so it is not a Hugging Face checkpoint"
    (folder / "example.py").touch()
    assert "exported" in refusal(folder) and f"python {folder / 'example.py'}" in refusal(folder)


def test_an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder) == (
        f"{folder} holds a peft adapter, not a whole model: merge it first (`vitopt finetune` does)"
    )


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder} has no model.safetensors, so there are no weights to load"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "best.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_refused_with_the_way_out(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    line = refusal(folder)
    assert line.startswith(f"{folder}: {name} is a pickle, which can run code when it is opened, so vitopt refuses it;")
    code = re.search(r'if you trust its origin, convert it with: python -c "(.*)"$', line)
    assert code is not None
    compile(code[1], "conversion", "exec")
    assert f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('converted')" in code[1]


def test_a_pickle_beside_safetensors_is_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert len(load_model(open_checkpoint(str(folder))).state_dict()) > 0


@pytest.mark.parametrize("keep", [0, 4, 5000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = refusal(folder)
    assert line.startswith(f"{path} is not a complete safetensors file (")
    assert line.endswith("): copy it again")


@pytest.mark.parametrize("architectures", [["ViTModel"], ["ViTForMaskedImageModeling"]])
def test_what_is_no_classifier(folder, architectures):
    change_config(folder, architectures=architectures)
    assert refusal(folder) == (
        f"{folder} is not an image classifier (it is {architectures[0]}); "
        "vitopt needs an ...ForImageClassification model"
    )


def test_a_model_without_a_head(folder):
    change_config(folder, architectures=None)
    assert "is not an image classifier (it is vit without a head)" in refusal(folder)


def test_a_family_that_vitopt_does_not_know(folder):
    change_config(folder, model_type="resnet", architectures=["ResNetForImageClassification"])
    line = refusal(folder)
    assert line.startswith(f"{folder} is of model type 'resnet', which is not supported: vitopt opens beit, clip, ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a valid JSON file"),
        ("", "is not a valid JSON file"),
        ("[1]", "config.json is not a mapping"),
        ("{}", "config.json has no model_type"),
        ('{"model_type": ["vit"]}', "config.json has no model_type"),
        ('{"model_type": "no-such-type"}', "is of model type 'no-such-type', which is not supported"),
        ('{"model_type": "vit", "architectures": {"a": 1}}', "architectures in config.json is not a list of names"),
        (
            '{"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": "wide"}',
            "hidden_size is 'wide', not 1 to",
        ),
    ],
)
def test_broken_configurations(folder, content, words):
    (folder / "config.json").write_text(content)
    line = refusal(folder)
    assert str(folder) in line
    assert words in line


def test_a_hub_id_whose_shape_is_known_can_be_planned_without_a_network():
    source = "google/vit-base-patch16-224"
    assert open_checkpoint(source, config_only=True).config.hidden_size == 768
    assert "cannot fetch" in refusal(source)
    assert "cannot fetch" in refusal("google/unheard-of", config_only=True)


def test_the_built_in_model():
    if not built_in_path().is_dir():
        pytest.skip("vit-quickstart is not in this checkout")
    checkpoint = open_checkpoint("vit-quickstart")
    assert checkpoint.source == "vit-quickstart"
    pixels = torch.zeros(1, 3, *checkpoint.image_size)
    with torch.inference_mode():
        assert load_model(checkpoint)(pixels).logits.shape == (1, len(checkpoint.label_names))


def test_random_weights():
    checkpoint = open_checkpoint("random:vit-tiny-patch16-32")
    assert (checkpoint.is_random, checkpoint.folder, checkpoint.image_size) == (True, None, (32, 32))
    first, second = (load_model(checkpoint) for _ in range(2))
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.dtype == torch.float32
    assert load_processor(checkpoint).size["height"] == 32
    assert load_model(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16
    fresh = load_model(checkpoint, label_names=["a", "b"])
    assert (fresh.classifier.out_features, fresh.config.id2label) == (2, {0: "a", 1: "b"})
    assert checkpoint.config.num_labels == 1000
    line = refusal("random:vit-tiny")
    assert line.startswith("no architecture 'vit-tiny'; give NAME-patch16-224") and "deit-SIZE-distilled" in line
    assert load_refusal("random:vit-tiny-patch16-32", quantization=object()) == (
        "random:vit-tiny-patch16-32 must be saved before it is quantized"
    )


@pytest.mark.parametrize("config", [CLIPConfig, SiglipConfig])
def test_the_image_size_of_models_with_a_text_half(config):
    checkpoint = Checkpoint("x", "x", config(vision_config={"image_size": 96}))
    assert checkpoint.image_size == (96, 96)


def test_an_image_size_of_two_numbers():
    config = Dinov2Config()
    config.image_size = [24, 48]
    assert Checkpoint("x", "x", config).image_size == (24, 48)


def test_names_of_some_outputs_alone_are_refused(folder):
    change_config(folder, id2label={"0": "a", "2": "c"}, label2id={"a": 0, "c": 2})
    assert "id2label does not name the outputs 0 to 1" in refusal(folder)


# load


def test_load_gives_a_model_for_inference(tiny_checkpoint):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model = load_model(checkpoint)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    stored = load_file(tiny_checkpoint / "model.safetensors")
    assert torch.equal(model.classifier.weight, stored["classifier.weight"])
    half = load_model(checkpoint, dtype=torch.bfloat16, attention="eager")
    assert half.dtype == torch.bfloat16
    assert half.config._attn_implementation == "eager"


def test_the_type_of_the_file_is_kept(quantized):
    assert load_model(quantized("bf16")).dtype == torch.bfloat16


def test_a_fresh_head(tiny_checkpoint):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    old, new = load_model(checkpoint), load_model(checkpoint, label_names=["cat", "dog"])
    assert new.classifier.weight.shape == (2, 64)
    assert new.config.id2label == {0: "cat", 1: "dog"}
    assert new.config.label2id == {"cat": 0, "dog": 1}
    assert torch.equal(new.vit.layers[2].mlp.fc2.weight, old.vit.layers[2].mlp.fc2.weight)
    renamed = load_model(checkpoint, label_names=["a", "b", "c", "d"])
    assert torch.equal(renamed.classifier.weight, old.classifier.weight)
    assert renamed.config.id2label[3] == "d"


def test_weights_that_are_missing(folder):
    change_weights(folder, lambda weights: weights.pop("vit.layernorm.weight"))
    line = f"{folder} lacks weights that its config.json asks for, first vit.layernorm.weight: copy both from one model"
    assert load_refusal(folder) == line
    assert load_refusal(folder, label_names=["a", "b"]) == line


def test_a_missing_head_is_an_error_unless_it_is_replaced(folder):
    change_weights(folder, lambda weights: (weights.pop("classifier.weight"), weights.pop("classifier.bias")))
    assert "first classifier.bias" in load_refusal(folder)
    assert load_model(open_checkpoint(str(folder)), label_names=["a", "b"]).classifier.out_features == 2


@pytest.mark.parametrize("label_names", [None, ["a", "b"]])
def test_weights_that_do_not_fit(folder, label_names):
    change_weights(folder, lambda weights: weights.update({"vit.layernorm.weight": torch.zeros(3)}))
    assert load_refusal(folder, label_names=label_names) == (
        f"the weights of {folder} do not fit its config.json, first vit.layernorm.weight: its shape is (3,), "
        "the configuration asks for (64,); copy both from one model"
    )


def test_a_head_that_does_not_fit(folder):
    change_config(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    assert "first classifier.bias: its shape is (4,), the configuration asks for (2,)" in load_refusal(folder)


def test_weights_of_another_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert f"{folder} has no model.safetensors" in refusal(folder)


def test_a_pickle_is_not_opened_where_safetensors_has_another_name(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "pytorch_model.bin is a pickle" in refusal(folder)


def test_hub_weights_that_are_only_pickles(monkeypatch, tiny_checkpoint):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("owner/vit does not appear to have a file named model.safetensors")

    monkeypatch.setattr(module.AutoModelForImageClassification, "from_pretrained", refuse)
    checkpoint = Checkpoint("owner/vit", "owner/vit", open_checkpoint(str(tiny_checkpoint)).config)
    with pytest.raises(CheckpointError, match=r"^owner/vit: the only weight file is a pickle, which can run code"):
        load_model(checkpoint)


# processor


def test_the_processor_is_the_checkpoints_own(tiny_checkpoint):
    processor = load_processor(open_checkpoint(str(tiny_checkpoint)))
    assert dict(processor.size) | {"height": 32, "width": 32} == dict(processor.size)
    assert list(processor.image_mean) == [0.5] * 3


def test_a_processor_that_is_missing_or_broken(folder):
    path = folder / "preprocessor_config.json"
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_processor(open_checkpoint(str(folder)))
    assert one_line(caught.value) == (
        f"{folder} has no preprocessor_config.json: copy it from the model it was made from"
    )
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json' is not a valid JSON file\.$"):
        load_processor(open_checkpoint(str(folder)))


# save


def test_what_is_saved_opens_again(tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model = load_model(checkpoint)
    save_checkpoint(model, load_processor(checkpoint), tmp_path)
    again = open_checkpoint(str(tmp_path))
    assert again.label_names == CLASSES
    loaded = load_model(again)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_processor(again).to_dict() == load_processor(checkpoint).to_dict()


def test_a_full_disk_while_saving_is_explained(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model = load_model(checkpoint)

    def no_space(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", no_space)
    with pytest.raises(StorageError, match="the disk is full"), storage.staged_folder(tmp_path / "out") as out:
        save_checkpoint(model, None, out)
    assert list(tmp_path.iterdir()) == []


# fingerprint


def test_the_fingerprint_is_that_of_the_content(tiny_checkpoint, folder, tmp_path):
    original = open_checkpoint(str(tiny_checkpoint)).fingerprint()
    assert open_checkpoint(str(folder)).fingerprint() == original
    assert open_checkpoint(str(folder.rename(tmp_path / "moved"))).fingerprint() == original


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_weights(folder, lambda weights: weights["classifier.bias"][0].add_(1e-3)),
        lambda folder: change_config(folder, hidden_act="relu"),
        lambda folder: (folder / "preprocessor_config.json").write_text(
            '{"image_processor_type": "ViTImageProcessor"}'
        ),
    ],
    ids=["weight", "configuration", "preprocessor"],
)
def test_the_fingerprint_changes_with(folder, change):
    before = open_checkpoint(str(folder)).fingerprint()
    change(folder)
    assert open_checkpoint(str(folder)).fingerprint() != before


def test_the_fingerprint_of_a_quantized_checkpoint_is_stable(quantized, tmp_path):
    checkpoint = quantized("w8a8")
    shutil.copytree(checkpoint.folder, tmp_path / "copy")
    assert open_checkpoint(str(tmp_path / "copy")).fingerprint() == checkpoint.fingerprint()
    assert checkpoint.fingerprint() != quantized("nf4").fingerprint()


@pytest.fixture
def hub(tmp_path, tiny_checkpoint, monkeypatch):
    """Puts the tiny checkpoint into a cache of the hub as `owner/tiny` at a commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def push(commit: str, **changes: object) -> None:
        repository = tmp_path / "hub" / "models--owner--tiny"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
        if changes:
            change_weights(repository / "snapshots" / commit, **changes)

    return push


def test_the_fingerprint_of_a_hub_id_changes_with_its_weights(hub):
    hub("a" * 40)
    before = open_checkpoint("owner/tiny")
    assert before.fingerprint() == open_checkpoint("owner/tiny").fingerprint()
    hub("b" * 40, change=lambda weights: weights["classifier.bias"][0].add_(1e-3))
    after = open_checkpoint("owner/tiny")
    assert after.config.to_dict() == before.config.to_dict()
    assert after.fingerprint() != before.fingerprint()


def test_a_hub_id_loads_the_weights_of_its_fingerprint(hub):
    hub("a" * 40)
    before = open_checkpoint("owner/tiny")
    expected = load_model(before).classifier.bias.detach().clone()
    hub("b" * 40, change=lambda weights: weights["classifier.bias"][0].add_(1))
    assert torch.equal(load_model(before).classifier.bias, expected)
    assert not torch.equal(load_model(open_checkpoint("owner/tiny")).classifier.bias, expected)
    assert load_processor(before).to_dict()


# sizes


def test_an_empty_model_has_shapes_and_no_memory(tiny_checkpoint, quantized):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model = empty_model(checkpoint)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert parameter_count(model) == PARAMETERS
    assert empty_model(checkpoint, classes=7).classifier.out_features == 7
    assert checkpoint.config.num_labels == 4
    # A model of 632 million parameters is as quick: nothing is drawn or held.
    assert parameter_count(empty_model(open_checkpoint("random:vit-huge-patch14-224"))) > 600e6
    unpacked = empty_model(quantized("nf4"))
    assert type(unpacked.vit.layers[0].mlp.fc1) is torch.nn.Linear
    assert quantized("nf4").is_quantized


def call(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("fp32", 4 * PARAMETERS),
        ("fp16", 2 * PARAMETERS),
        ("bf16", 2 * PARAMETERS),
        # one byte each, and a float32 scale per row
        ("int8", 2 * (PARAMETERS - IN_LINEARS) + IN_LINEARS + 4 * LINEAR_ROWS),
        # one byte each, and a float32 scale and an int8 zero point per row
        ("w8a8", 2 * (PARAMETERS - IN_LINEARS) + IN_LINEARS + 5 * LINEAR_ROWS),
        # Half a byte each; a byte of scale per 64. Per layer: 16 code values, and for the scales' own
        # quantization 256 code values, one scale and one offset.
        ("nf4", 2 * (PARAMETERS - IN_LINEARS) + IN_LINEARS // 2 + IN_LINEARS // 64 + 18 * 4 * (16 + 256 + 1 + 1)),
    ],
)
def test_weight_bytes_against_a_count_by_hand(quantized, format, expected):
    model = load_model(quantized(format))
    assert weight_bytes(model) == expected
    assert parameter_count(model) == PARAMETERS


def test_the_first_call_of_an_int8_model_moves_its_scales_and_loses_no_byte(quantized):
    model = load_model(quantized("int8"))
    before = weight_bytes(model)
    call(model)
    assert model.vit.layers[0].mlp.fc1.weight.SCB is None
    assert weight_bytes(model) == before


def test_packed_models_count_their_original_elements_after_a_call_too(quantized):
    model = load_model(quantized("nf4"))
    call(model)
    assert parameter_count(model) == PARAMETERS


def test_buffers_count(tiny_checkpoint):
    model = load_model(open_checkpoint(str(tiny_checkpoint)))
    model.register_buffer("table", torch.zeros(10, dtype=torch.int16))
    assert weight_bytes(model) == 4 * PARAMETERS + 20


def test_disk_bytes_are_those_of_the_files_that_are_needed(folder):
    needed = ("model.safetensors", "config.json", "preprocessor_config.json")
    expected = sum((folder / name).stat().st_size for name in needed)
    (folder / "optimizer.pt").write_bytes(bytes(1000))
    assert disk_bytes(folder) == expected
    (folder / "model-2.safetensors").write_bytes(bytes(10))
    (folder / "model.safetensors.index.json").write_bytes(bytes(5))
    assert disk_bytes(folder) == expected + 15


def test_each_of_two_heads_is_fresh(make_family):
    checkpoint = make_family("deit", with_teacher=True)
    assert len(checkpoint.label_names) == 4
    old, new = load_model(checkpoint), load_model(checkpoint, label_names=["cat", "dog"])
    assert (new.cls_classifier.out_features, new.distillation_classifier.out_features) == (2, 2)
    assert torch.equal(old.deit.layers[1].mlp.fc2.weight, new.deit.layers[1].mlp.fc2.weight)
    with torch.inference_mode():
        assert new(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_a_missing_head_of_two_is_refused_where_none_is_fresh(make_family):
    checkpoint = make_family("deit", with_teacher=True)
    file = checkpoint.weights[0]
    tensors = load_file(file)
    del tensors["distillation_classifier.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights .* first distillation_classifier\.weight"):
        load_model(open_checkpoint(checkpoint.source))
