from types import SimpleNamespace

from vitopt.report.strip import strips


def strip_of(make: SimpleNamespace, layers):
    (strip,) = strips([make.record("a", layers=layers)])
    return strip


def test_every_block_has_a_cell_per_linear_layer(make: SimpleNamespace):
    strip = strip_of(make, make.layers("nf4", blocks=24, block_3="bf16", block_4_fc2="int8"))

    assert list(strip.blocks) == list(range(24))
    assert strip.blocks[3] == ("bf16",) * 6
    assert strip.blocks[4] == ("nf4",) * 5 + ("int8",)
    assert strip.head == "bf16"
    assert strip.formats == {"nf4": 24 * 6 - 7, "bf16": 7, "int8": 1}


def test_blocks_are_in_order_of_number_not_of_text(make: SimpleNamespace):
    strip = strip_of(make, dict(reversed(make.layers("fp32", blocks=11).items())))

    assert list(strip.blocks) == list(range(11))


def test_absent_layers_leave_their_cell_empty(make: SimpleNamespace):
    layers = {name: format for name, format in make.layers("nf4", blocks=1).items() if "output" not in name}

    assert strip_of(make, layers).blocks[0] == ("nf4", "nf4", "nf4", None, "nf4", "nf4")


def test_variants_without_layers_have_no_strip(make: SimpleNamespace):
    assert strips([make.record("failed", "fp8", failure="no", layers={})]) == []


def test_two_heads_share_one_cell(make: SimpleNamespace):
    layers = make.layers("nf4", blocks=1)
    half = layers.pop("classifier")

    assert strip_of(make, layers | {"classifier.class": half, "classifier.distillation": half}).head == half
