import pytest

from vitopt.models.architectures import explain_names, known_architecture


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit-tiny-patch16-224", (192, 12, 3, 768, 16, 224)),
        ("vit-small-patch32-384", (384, 12, 6, 1536, 32, 384)),
        ("google/vit-base-patch16-224-in21k", (768, 12, 12, 3072, 16, 224)),
        ("vit-large-patch16-224", (1024, 24, 16, 4096, 16, 224)),
        ("owner/vit-huge-patch14-224", (1280, 32, 16, 5120, 14, 224)),
    ],
)
def test_published_shapes(name, shape):
    config = known_architecture(name)
    assert config is not None
    assert (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.patch_size,
        config.image_size,
    ) == shape
    assert config.num_labels == 1000
    assert config.architectures == ["ViTForImageClassification"]


@pytest.mark.parametrize(
    "name",
    [
        "vit-giant-patch14-224",
        "vit-base",
        "vit-base-patch16",
        "vit-base-patchy-224",
        "vit-base-patch0-224",
        "vit-base-patch16-8",
        "resnet-50-patch16-224",
        "vit-base-patch16-window7-224",
        "swin-huge-patch4-224",
        "vit_msn-base-patch16-224",
        "",
    ],
)
def test_names_that_are_no_known_shape(name):
    assert known_architecture(name) is None


@pytest.mark.parametrize(
    ("name", "model_type", "shape"),
    [
        ("microsoft/swin-tiny-patch4-window7-224", "swin", (96, [2, 2, 6, 2], [3, 6, 12, 24], 4, 7, 224)),
        ("microsoft/swinv2-base-patch4-window8-256", "swinv2", (128, [2, 2, 18, 2], [4, 8, 16, 32], 4, 8, 256)),
        ("swin-small-patch4-224", "swin", (96, [2, 2, 18, 2], [3, 6, 12, 24], 4, 7, 224)),
    ],
)
def test_published_shapes_with_stages(name, model_type, shape):
    config = known_architecture(name)
    fields = ("embed_dim", "depths", "num_heads", "patch_size", "window_size", "image_size")
    assert config.model_type == model_type
    assert tuple(getattr(config, field) for field in fields) == shape


def test_every_family_has_a_name_and_every_name_its_class():
    names = {
        "deit-tiny-patch16-224": ("deit", "DeiTForImageClassification"),
        "deit-tiny-distilled-patch16-224": ("deit", "DeiTForImageClassificationWithTeacher"),
        "vit-msn-small-patch16-224": ("vit_msn", "ViTMSNForImageClassification"),
        "ijepa-huge-patch14-224": ("ijepa", "IJepaForImageClassification"),
        "beit-large-patch16-224": ("beit", "BeitForImageClassification"),
        "dinov2-base-patch14-224": ("dinov2", "Dinov2ForImageClassification"),
        "dinov2-with-registers-base-patch14-224": (
            "dinov2_with_registers",
            "Dinov2WithRegistersForImageClassification",
        ),
    }
    for name, expected in names.items():
        config = known_architecture(name)
        assert (config.model_type, config.architectures) == (expected[0], [expected[1]])


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_families_with_a_text_half_keep_the_shape_in_their_vision_half(family):
    vision = known_architecture(f"{family}-small-patch16-224").vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (384, 12, 224)


def test_settings_come_on_top():
    config = known_architecture("swin-micro-patch4-window4-32", depths=[1], num_labels=4)
    assert (config.depths, config.num_labels, config.hidden_size) == ([1], 4, 32)


def test_the_explanation_names_every_family():
    told = explain_names()
    assert all(name in told for name in ("vit-SIZE", "deit-SIZE-distilled", "swinv2-SIZE", "timm-vit-SIZE", "large"))
