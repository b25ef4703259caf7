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
