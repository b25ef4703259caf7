from types import SimpleNamespace

from vitopt.report.strip import strips


def test_every_block_has_a_cell_per_linear_layer(make: SimpleNamespace):
    (strip,) = strips([make.record("nf4", "nf4", layers=make.layers("nf4", blocks=24, block_3="bf16"))])

    assert [block.number for block in strip.blocks] == list(range(24))
    assert strip.blocks[3].formats == ("bf16",) * 6
    assert strip.blocks[4].formats == ("nf4",) * 6
    assert strip.head == "bf16"
    assert strip.words == "blocks 0–2 nf4; block 3 bf16; blocks 4–23 nf4; head bf16"


def test_blocks_are_in_order_of_number_not_of_text(make: SimpleNamespace):
    layers = dict(reversed(make.layers("fp32", blocks=11).items()))

    (strip,) = strips([make.record("fp32", layers=layers)])

    assert [block.number for block in strip.blocks] == list(range(11))
    assert strip.words == "all 11 blocks fp32; head fp32"


def test_mixed_blocks_say_which_layers_differ(make: SimpleNamespace):
    layers = make.layers("nf4", blocks=2, block_1_query="int8", block_1_fc2="int8")

    (strip,) = strips([make.record("mixed", "nf4", layers=layers)])

    assert strip.blocks[1].formats == ("int8", "nf4", "nf4", "nf4", "nf4", "int8")
    assert strip.words == "block 0 nf4; block 1 query fc2 int8, others nf4; head bf16"


def test_absent_layers_leave_their_cell_empty(make: SimpleNamespace):
    layers = {name: format for name, format in make.layers("nf4", blocks=1).items() if "output" not in name}

    (strip,) = strips([make.record("nf4", "nf4", layers=layers)])

    assert strip.blocks[0].formats == ("nf4", "nf4", "nf4", None, "nf4", "nf4")


def test_variants_without_layers_have_no_strip(make: SimpleNamespace):
    assert strips([make.record("failed", "fp8", failure="no", layers={})]) == []


def test_legend_lists_the_formats_that_occur_once(make: SimpleNamespace):
    (strip,) = strips([make.record("nf4", "nf4", layers=make.layers("nf4", block_3="int8"))])

    assert strip.formats == ["nf4", "int8", "bf16"]


def test_two_heads_share_one_cell(make: SimpleNamespace):
    layers = make.layers("nf4", blocks=1)
    half = layers.pop("classifier")
    layers |= {"classifier.class": half, "classifier.distillation": half}

    (strip,) = strips([make.record("nf4", "nf4", layers=layers)])

    assert strip.head == half
    assert strip.words == f"all 1 blocks nf4; head {half}"
