import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from vitopt.errors import RecordError
from vitopt.measure.predictions import PREDICTIONS_FILE
from vitopt.records import EndToEnd, FailedLatency, Memory, Throughput
from vitopt.report.page import write_report
from vitopt.report.results import open_run

EVIL = '<script>alert("x")</script>&amp;$a$|b'
LONG = "adaptive-112-openvino-int8"


class Reader(HTMLParser):
    """Collects what a page refers to, its ids, its text, and whether its tags are balanced."""

    VOID = ("meta", "img", "br", "link", "input", "path", "use", "rect", "circle")

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.text, self.tags, self.images = [], [], [], [], []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [found[key] for key in ("src", "href", "xlink:href", "srcset", "data") if found.get(key)]
        self.ids += [found["id"]] if "id" in found else []
        self.images += [found] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def read(folder):
    return Reader(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def awkward(make: SimpleNamespace, tmp_path_factory):
    """Text of a page of 24-block variants with long and hostile names, failures and every kind of figure."""
    before = make.predictions(wrong=(0,), images=200)
    against, times = ("fp32", before), {1: 30.0, 64: 640.0}
    layers = make.layers("fp32", blocks=24)
    parts = {"decode_ms": 4.0, "preprocess_ms": 6.0, "copy_ms": 0.1, "model_ms": 5.0, "postprocess_ms": 0.2}
    call = EndToEnd(batch_size=1, iterations=9, total_p50_ms=15.0, total_p95_ms=16.0, images_per_second=66, **parts)
    names = [EVIL, "x" * 80, "-".join(["vit"] * 20), "nf4", LONG]
    found = {"fp32": before}
    records = [make.record("fp32", p50_ms=times, predictions=before, layers=layers)]
    for index, name in enumerate(names):
        found[name] = make.predictions(wrong=range(index, 90, 3), images=200)
        records.append(
            make.record(
                name,
                ("nf4", "int8", "w8a8", "fp8", "bf16")[index % 5],
                p50_ms={size: ms / (1 + 0.3 * index) for size, ms in times.items()},
                predictions=found[name],
                baseline=against,
                baseline_ms=times,
                layers=make.layers("nf4", blocks=24, block_1_fc2="int8", block_9="bf16"),
                memory=Memory(peak_bytes=10**9 + index, kind="cuda_allocated", batch_size=1),
                end_to_end=(call,),
                throughput=Throughput(batch_size=64, images_per_second=999.0, largest_batch_size=128),
                latency_failures=(FailedLatency(batch_size=512, reason=EVIL),),
                warnings=("other processes used 22 % of the CPU while latency was measured",),
            )
        )
    records.append(make.record("broken", "fp8", failure=EVIL * 3, layers={}, model=None, weight_bytes=None))
    return write_report(make.run(tmp_path_factory.mktemp("awkward") / "run", records, found)).read_text()


def test_the_page_needs_nothing_but_itself(awkward):
    page = Reader(awkward)

    assert page.open == []
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    # Only the names of the SVG namespaces look like addresses.
    addresses = set(re.findall(r"https?://[^\"' )]+", awkward))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in awkward
    assert len(awkward) < 3_000_000


def test_names_and_reasons_are_shown_and_not_run(awkward):
    page = Reader(awkward)

    assert EVIL in page.words
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_failed_variants_are_rows_with_their_reason(comparison, make: SimpleNamespace, tmp_path):
    page = read(make.run(tmp_path, *comparison))

    assert "failed: fp8 cannot run on cpu" in page.words
    assert "fp8 failed: fp8 cannot run on cpu" in (tmp_path / "report.md").read_text()


def test_all_parts_are_there(comparison, make: SimpleNamespace, tmp_path):
    page = read(make.run(tmp_path, *comparison, waterfall=True))

    sections = [name for name in page.ids if "-" not in name]
    assert sections == [
        "summary",
        "comparison",
        "tradeoff",
        "latency",
        "size",
        "changes",
        "layers",
        "reading",
        "repeat",
    ]
    for words in (
        "no loss shown",  # the verdict on bf16
        "fp32 → bf16 → nf4",  # the chain
        "24 right to wrong, 1 wrong to right",
        "4 of 4 classes worse, 0 better",
        "vitopt run recipe.yaml",
        "0" * 64,
        "Test CPU",
        "2.13.0",
    ):
        assert words in page.words
    legends = re.findall(r'<ul class="legend"[^>]*>(.*?)</ul>', (tmp_path / "report.html").read_text())
    assert len(legends) == 4 and all("nf4" in legend for legend in legends)
    assert 'aria-label="Layer plan of nf4: 72 nf4, 1 bf16"' in (tmp_path / "report.html").read_text()
    assert page.tags.count("caption") == page.tags.count("table")


def test_pictures_are_inlined_with_a_description(make: SimpleNamespace, shapes, tmp_path):
    from vitopt.data.images import open_images
    from vitopt.measure.predictions import Predictions
    from vitopt.recipe import DataSpec

    images = open_images(DataSpec(source=str(shapes)), "test")
    made = {name: make.predictions(wrong, images=len(images)) for name, wrong in [("fp32", ()), ("nf4", (3, 7))]}
    found = {name: Predictions(images.ids, images.image_hashes, one.labels, one.logits) for name, one in made.items()}
    records = [
        make.record("fp32", predictions=found["fp32"]),
        make.record("nf4", "nf4", predictions=found["nf4"], baseline=("fp32", found["fp32"])),
    ]
    place = {"dataset": records[0].dataset.model_copy(update={"name": str(shapes)})}

    page = read(make.run(tmp_path, [record.model_copy(update=place) for record in records], found))

    assert [image["alt"] for image in page.images] == [
        f"Image {images.ids[index]}, labelled stripe" for index in (7, 3)
    ]
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.images)
    assert "The pictures are not shown" not in page.words


def test_a_benchmark_without_accuracy_has_no_empty_sections(make: SimpleNamespace, tmp_path):
    records = [make.record("a", p50_ms={1: 3.0}), make.record("b", p50_ms={1: 2.0}, baseline_ms={1: 3.0})]

    page = read(make.run(tmp_path, records))

    assert "Measured on random pixels" in page.words
    assert not {"tradeoff", "changes"} & set(page.ids)
    for text in (page.words.replace("‑", "-"), (tmp_path / "report.md").read_text()):
        for word in ("accuracy", "Accuracy", "top-1", "Δ points", "agree", "McNemar", "calibration", "Tango", "floor"):
            assert word not in text
    assert "Student's t over the rounds" in page.words


def speed_alone(make: SimpleNamespace, **more):
    """Three variants that add one thing each, at three batch sizes, with floors."""
    first = {1: 8.0, 8: 16.0, 32: 40.0}
    floors = {1: 0.05, 8: 0.4, 32: 1.6}
    return [
        make.record("bf16", "bf16", p50_ms=first, floor_ms=floors, ran={"attention": "sdpa", "sdpa_kernel": "flash"}),
        make.record("fused", "bf16", p50_ms={1: 7.0, 8: 14.0, 32: 36.0}, floor_ms=floors),
        make.record("w8a8", "w8a8", p50_ms={1: 4.0, 8: 8.0, 32: 16.0}, floor_ms=floors, **more),
    ]


def test_what_the_device_allows_is_said_on_both_pages(make: SimpleNamespace, tmp_path):
    page = read(make.run(tmp_path, speed_alone(make), waterfall=True))

    text = (tmp_path / "report.md").read_text()
    assert "What the device allows" in page.words
    assert "712 TFLOP/s in bf16" in page.words
    assert "MFU" in page.words and "- MFU: " in text
    assert "## What the device allows\n\n- matrix rate: 712 TFLOP/s in bf16\n- copy rate: 4.10 TB/s" in text
    assert "- one image: 2.51 GFLOP" in text
    assert "| bf16 | bf16 | sdpa flash | 8.00 | 8.72 | 8.78 | 0.050 | 125 | 0.6 |" in text
    assert [f"plots/waterfall-{size}.png" in text for size in (1, 8, 32)] == [True] * 3


def test_without_rates_nothing_is_said_of_what_the_device_allows(comparison, make: SimpleNamespace, tmp_path):
    page = read(make.run(tmp_path, *comparison))

    for text in (page.words, (tmp_path / "report.md").read_text()):
        assert not re.search("device allows|floor|MFU|FLOP", text)


def test_a_table_of_very_many_columns_has_its_words_below_the_name(comparison, make: SimpleNamespace, tmp_path):
    before, times = make.predictions(), {1: 3.0}
    used = Memory(peak_bytes=10**9, kind="cuda_allocated", batch_size=1)
    many = {"p50_ms": times, "floor_ms": {1: 0.5}, "predictions": before, "memory": used}
    records = [make.record("a", **many), make.record("b", **many, baseline=("a", before), baseline_ms=times)]

    widest = write_report(make.run(tmp_path / "a", records)).read_text()
    usual = write_report(make.run(tmp_path / "b", *comparison)).read_text()

    assert widest.count('<table class="wide">') == 1
    assert '<td class="words">' in widest  # for readers without styles, and for machines
    assert '<table class="wide">' not in usual


@pytest.mark.parametrize(
    "fields",
    [
        {"p50_ms": {1: 3.0}},
        {"failure": "no", "layers": {}, "model": None, "weight_bytes": None, "environment": {}},
        {"layers": {}, "weight_bytes": None, "command": None, "created": None},
    ],
)
def test_a_single_variant_is_enough(make: SimpleNamespace, tmp_path, fields):
    page = read(make.run(tmp_path, [make.record("only", **fields)]))

    assert "only" in page.words
    assert "repeat" in page.ids


def test_accuracy_alone_is_enough(make: SimpleNamespace, tmp_path):
    before, after = make.predictions(), make.predictions(wrong=(1,))
    records = [
        make.record("fp32", predictions=before),
        make.record("nf4", predictions=after, baseline=("fp32", before)),
    ]

    page = read(make.run(tmp_path, records))

    assert "latency" not in page.ids
    assert "1 of 4 classes worse" in page.words
    assert "Images that flipped" not in page.words  # no predictions were kept


def test_unreadable_predictions_are_said_and_the_rest_is_shown(comparison, make: SimpleNamespace, tmp_path):
    folder = make.run(tmp_path, *comparison)
    (folder / "variants" / "01" / PREDICTIONS_FILE).write_bytes(b"not parquet")

    page = read(folder)

    assert "cannot be read as predictions" in page.words
    assert "Images that flipped" in page.words


def test_different_machines_or_images_are_pointed_out(make: SimpleNamespace, tmp_path):
    few, many = make.predictions(), make.predictions(images=44)
    records = [
        make.record("a", predictions=few),
        make.record("b", predictions=many, environment={"processor": "Other"}),
    ]
    records[1] = records[1].model_copy(update={"dataset": records[1].dataset.model_copy(update={"sha256": "1" * 64})})

    page = read(make.run(tmp_path, records))

    assert "measured on different devices" in page.words
    assert "measured on different images" in page.words


def test_records_come_in_the_order_of_the_recipe(make: SimpleNamespace, tmp_path):
    for name in ("b", "a", "c"):
        made = make.run(tmp_path / "made" / name, [make.record(name)]) / "variants" / "00"
        shutil.copytree(made, tmp_path / "run" / "variants" / name)
    variants = [{"name": name, "format": "fp32"} for name in ("c", "a", "b")]
    recipe = {"name": "x", "model": "m", "data": "digits", "variants": variants, "baseline": "a"}
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))

    assert [record.variant.name for record in open_run(tmp_path / "run").records] == ["c", "a", "b"]
    assert '"baseline": "a"' in read(tmp_path / "run").words


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"holds no records .*give the folder of a `vitopt run`"):
        write_report(tmp_path)


def test_markdown_has_a_table_per_batch_size_and_the_plots(comparison, make: SimpleNamespace, tmp_path):
    write_report(make.run(tmp_path / "run", *comparison))

    text = (tmp_path / "run" / "report.md").read_text()

    assert text.startswith("# run\n\nAccuracy against fp32 on 40 images")
    assert text.count("| variant | format |") == 2
    assert "| bf16 | bf16 | sdpa | 95.0 | +0.0 (" in text
    for path in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (tmp_path / "run" / path).is_file()
    assert "```sh\nvitopt run recipe.yaml\n```" in text


def test_the_same_run_gives_the_same_report(comparison, make: SimpleNamespace, tmp_path):
    folder = make.run(tmp_path, *comparison)

    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def widths_in_a_browser(text, folder, name=""):
    """[scrolled, shown] width of a page in frames of 390 and 1280 pixels, with a `name` the lines that it takes in the
    table, and what the browser complains about."""
    inner = html.escape(text)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{inner}"></iframe>' for width in (390, 1280))
    measure = """
      onload = () => { document.body.textContent = "widths " + JSON.stringify([...document.querySelectorAll("iframe")]
        .map(frame => frame.contentDocument.documentElement)
        .map(root => [root.scrollWidth, root.clientWidth, ...("%NAME" ? [lines(root)] : [])])) }
      function lines(root) {
        const name = [...root.querySelectorAll("#comparison tbody th")].find(th => th.textContent.includes("%NAME"))
        const range = root.ownerDocument.createRange()
        range.selectNodeContents(name.firstChild)
        return range.getClientRects().length }""".replace("%NAME", name)
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!doctype html><style>iframe{{border:0}}</style><script>{measure}</script>{frames}")
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    logs = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-sync", "--hide-scrollbars", *quiet.split(), *logs]
    done = subprocess.run(
        [*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    widths = json.loads(re.search(r"widths (\[\[.*\]\])", done.stdout)[1])
    return widths, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_a_browser_shows_the_page_without_errors_or_sideways_scrolling(awkward, tmp_path):
    (phone, screen), messages = widths_in_a_browser(awkward, tmp_path, LONG)

    assert phone[:2] == [390, 390] and phone[2] > 1
    assert screen == [1280, 1280, 1]  # a name does not break at its hyphens
    assert messages == []
