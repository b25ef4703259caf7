"""LoRA beside packed weights: what it computes with is what the quantized checkpoint holds, and memory is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch.nn import functional

from vitopt.data.images import ImageSet
from vitopt.data.pixels import random_pixels
from vitopt.errors import PatternError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint, weight_bytes
from vitopt.models.names import linear_layers
from vitopt.models.origin import load_origin
from vitopt.optimize.quantize import quantize
from vitopt.recipe import FinetuneSpec, VariantSpec
from vitopt.training import finetune as training
from vitopt.training.finetune import TrainingReport, finetune
from vitopt.training.qat import round_nf4
from vitopt.training.qlora import PackedLora, pack

SPEC = FinetuneSpec(
    format="nf4", epochs=12, batch_size=16, learning_rate=1e-2, rank=8, flip=False, augment=False, precision="fp32"
)
PIXELS = random_pixels(8, (32, 32))


@pytest.fixture(scope="module")
def learned(
    tiny: Checkpoint, train: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainingReport, Any, torch.Tensor]:
    """The folder of a training, its report, the model of its last evaluation, and what that answers."""
    folder, kept = tmp_path_factory.mktemp("qlora") / "out", []
    evaluate = training.top1_percent

    def keeping(trainer: Any, data: Any) -> float:
        percent = evaluate(trainer, data)
        with torch.inference_mode():
            answers = trainer.model.eval()(pixel_values=PIXELS).logits
        layers = {
            name.removeprefix("base_model.model."): (module.base_layer.weight, round_nf4(module._whole_weight()))
            for name, module in trainer.model.named_modules()
            if isinstance(module, PackedLora)
        }
        kept.append((layers, weight_bytes(trainer.model), answers))
        return percent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "top1_percent", keeping)
        report = finetune(tiny, SPEC, folder, "cpu", images=train, test=train)
    (layers, held, answers) = kept[0]
    return folder, report, (layers, held), answers


def test_the_quantized_checkpoint_holds_and_answers_what_the_last_evaluation_did(
    learned: tuple[Path, TrainingReport, Any, torch.Tensor], tiny: Checkpoint, tmp_path: Path
) -> None:
    folder, _, (layers, _), last_answers = learned
    quantize(open_checkpoint(str(folder)), VariantSpec(name="v", format="nf4"), tmp_path / "q", "cpu")
    model = load_model(open_checkpoint(str(tmp_path / "q")))
    assert set(layers) == {layer.module for layer in linear_layers(model, "vit") if not layer.is_head}
    for name, (_, rounded) in layers.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state).float(), rounded.float())
    with torch.inference_mode():
        answers = model(PIXELS.bfloat16()).logits.float()
        before = load_model(tiny)(PIXELS).logits
    assert (last_answers - before).abs().max() > 0.5  # so far the training went
    torch.testing.assert_close(answers, last_answers, rtol=0.03, atol=0.1)  # bf16 beside fp32
    noted = load_origin(folder).last("finetune")
    assert noted is not None and (noted["method"], noted["format"], noted["rank"]) == ("lora", "nf4", 8)


def test_it_learns(learned: tuple[Path, TrainingReport, Any, torch.Tensor], tiny: Checkpoint) -> None:
    folder, report, _, _ = learned
    assert report.test_top1_percent is not None and report.test_top1_percent > 60  # chance is 25
    before, after = (load_model(checkpoint).state_dict() for checkpoint in (tiny, open_checkpoint(str(folder))))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    exact = {name for name in after if torch.equal(after[name], before[name])}
    assert not any("proj.weight" in name or ("fc" in name and name.endswith("weight")) for name in exact)
    assert "vit.layers.0.mlp.fc1.bias" in exact


def test_frozen_weights_take_an_eighth_and_only_updates_and_head_are_trained(
    learned: tuple[Path, TrainingReport, Any, torch.Tensor], tiny: Checkpoint
) -> None:
    _, report, (layers, held), _ = learned
    plain = load_model(tiny)
    updates = 8 * 3 * (4 * (64 + 64) + 2 * (64 + 128))
    assert report.trainable_parameters == updates + 64 * 4 + 4
    weights = 3 * (4 * 64 * 64 + 2 * 64 * 128)
    assert report.parameters == sum(p.numel() for p in plain.parameters()) + updates + 64 * 4 + 4
    # Of 32 bits 4 are left, scales of each 64 and tables of each layer; beside them stand updates and a copied head.
    others = weight_bytes(plain) - 4 * weights + 4 * (updates + 64 * 4 + 4)
    assert held - others < (1 / 2 + 1 / 64) * weights + 1200 * len(layers)
    assert all(packed.dtype == torch.uint8 and not packed.requires_grad for packed, _ in layers.values())


def test_gradients_are_those_of_the_whole_weight(tiny: Checkpoint) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_model(tiny)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["vit.layers.0.mlp.fc1"])
    config._register_custom_module(pack(model, FinetuneSpec(format="nf4", targets=("block.0.fc1",))))
    layer = get_peft_model(model, config).base_model.model.vit.layers[0].mlp.fc1
    assert isinstance(layer, PackedLora)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(up, std=0.1)
    inputs = torch.randn(5, 64, requires_grad=True)
    out = layer(inputs)
    packed = layer.base_layer.weight
    exact = dequantize_4bit(packed.data, packed.quant_state).float() + 2 * up @ down  # alpha / r is 2
    rounded = round_nf4(exact.detach()).float()
    torch.testing.assert_close(out, functional.linear(inputs, rounded, layer.base_layer.bias))
    signs = torch.randn(5, 128)
    (out * signs).sum().backward()
    weight_gradient = signs.T @ inputs.detach()
    torch.testing.assert_close(inputs.grad, signs @ rounded)
    torch.testing.assert_close(down.grad, 2 * up.detach().T @ weight_gradient)
    torch.testing.assert_close(up.grad, 2 * weight_gradient @ down.detach().T)


def test_a_resumed_training_ends_as_if_nothing_had_happened(
    tiny: Checkpoint, train: ImageSet, resumes: Callable[[Checkpoint, FinetuneSpec, ImageSet], None]
) -> None:
    spec = SPEC.model_copy(update={"epochs": 2, "batch_size": 16})
    resumes(tiny, spec, train)


def test_targets_that_cannot_be_packed_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(PatternError, match="'dense'"):
        pack(load_model(tiny), FinetuneSpec(format="nf4", targets=("dense",)))
    with pytest.raises(UnsupportedError, match="nf4"):
        pack(load_model(tiny), FinetuneSpec(format="nf4", targets=("classifier",)))
