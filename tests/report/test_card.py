from types import SimpleNamespace

from vitopt.report.card import CARD_FILE, write_card


def test_card_is_markdown_that_is_not_escaped_as_html(make: SimpleNamespace, comparison, tmp_path):
    records = comparison[0]
    record = records[2].model_copy(update={"layer_plan": {"nf4": 72, "bf16": 1}})

    write_card(record, tmp_path, records)

    text = (tmp_path / CARD_FILE).read_text()
    assert text.startswith("---\nlibrary_name: transformers")
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

    assert words == "40 images of `/data/shapes`, split test (sha256 000000000000), on Test CPU, batch size 1."
