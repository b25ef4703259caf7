import pytest

from vitopt.models.architectures import architecture_names, known_architecture


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
        "",
    ],
)
def test_names_that_are_no_known_shape(name):
    assert known_architecture(name) is None


def test_the_examples_are_known():
    assert all(known_architecture(name) for name in architecture_names())
    assert "vit-large-patch16-224" in architecture_names()
