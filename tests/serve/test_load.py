import asyncio
import threading

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402

from vitopt.data.images import open_images  # noqa: E402
from vitopt.errors import DataError, MeasurementError, RecipeError, UnsupportedError  # noqa: E402
from vitopt.measure.predictions import load_predictions  # noqa: E402
from vitopt.recipe import DataSpec  # noqa: E402
from vitopt.records import load_record  # noqa: E402
from vitopt.serve import load  # noqa: E402
from vitopt.serve.load import Client, arrivals, cost_per_million  # noqa: E402
from vitopt.serve.record import record_of  # noqa: E402
from vitopt.serving_record import CallerLatency, ServedRate  # noqa: E402

LABELS = ["circle", "cross", "square", "stripe"]


class Server:
    """Answers each image by `answer`, once as many requests as `together` are there at the same time."""

    def __init__(self, answer, together=1, ready=True, labels=LABELS, metrics=dict, status=200, **says):
        self.answer, self.together, self.ready, self.metrics = answer, together, ready, metrics
        self.says = {"name": "tiny", "ready": True, "labels": labels, "record": {}} | says
        self.status, self.bodies = status, []

    def __enter__(self):
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True).start()
        assert started.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)

    async def _run(self, started):
        self._loop, self._end, self._all = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        app = web.Application(client_max_size=10**8)
        app.router.add_get("/v2/health/ready", self._health)
        app.router.add_get("/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/predict", self._predict)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        await self._end.wait()
        await runner.cleanup()

    async def _health(self, request):
        return web.json_response({}, status=self.status if self.ready else 503)

    async def _models(self, request):
        return web.json_response([self.says] if self.status == 200 else {"error": "no"}, status=self.status)

    async def _metrics(self, request):
        return web.Response(text="".join(f"{name} {value}\n" for name, value in self.metrics().items()))

    async def _predict(self, request):
        self.bodies.append(await request.read())
        if len(self.bodies) >= self.together:
            self._all.set()
        await self._all.wait()
        status, content = self.answer(len(self.bodies) - 1, self.bodies[-1])
        text = isinstance(content, str)
        return web.Response(text=content, status=status) if text else web.json_response(content, status=status)


def good(index, percent=100.0, **more):
    return 200, {"classes": [{"label": "", "index": index, "percent": percent}], "batch": 2} | more


def latency(**changes):
    limits = {f"{name}_ci95_ms": (4.0, 6.0) for name in ("p50", "p95", "p99")}
    times = {f"{name}_ms": 5.0 for name in ("mean", "std", "min", "p50", "p95", "p99")}
    return CallerLatency(**{"count": 400} | times | limits | changes)


def served(rate, **changes):
    content = {"rate": rate, "seconds": 10, "sent": 200, "answered": 200, "refused": 0, "errors": {}}
    more = {"latency": latency(), "p99_of_sent_ms": 5.0, "slowest_refusal_ms": None, "right": 150, "mean_batch": 1.5}
    return ServedRate(**content | more | changes)


@pytest.fixture
def images(shapes):
    return open_images(DataSpec(source=str(shapes)), "test")


def test_requests_do_not_wait_for_answers(images):
    sent = len(arrivals(200, 0.2, 3))
    with Server(lambda *_: good(0), together=sent) as server:  # a client that waits for one would never end
        step = Client(server.url, images).send(200, 0.2, seed=3)
    assert step.sent == step.answered == sent and not step.errors
    assert step.mean_batch == 2


def test_answers_are_judged_by_the_image_that_was_sent(images):
    of = {images.reader.content(row): label for row, label in zip(images.rows, images.labels, strict=True)}
    with Server(lambda _, body: good(of[body])) as server:
        step = Client(server.url, images).send(100, 0.3)
    assert step.right == step.answered > 10
    with Server(lambda _, body: good((of[body] + 1) % 4)) as server:
        step = Client(server.url, images).send(100, 0.3)
    assert step.right == step.top1_percent == 0


def test_labels_are_those_of_the_server(images):
    order = ["stripe", "circle", "cross", "square"]
    name = {images.reader.content(r): images.class_names[k] for r, k in zip(images.rows, images.labels, strict=True)}
    with Server(lambda _, body: good(order.index(name[body])), labels=order) as server:
        step = Client(server.url, images).send(100, 0.2)
    assert step.right == step.answered > 5
    with Server(lambda *_: good(0), labels=["a", "b", "c"]) as server, pytest.raises(DataError):
        Client(server.url, images)


def test_refusals_and_errors_are_counted_apart(images):
    def answer(number, _):
        return [good(0), (503, "full"), (500, {"error": "broken"})][number % 3]

    with Server(answer) as server:
        step = Client(server.url, images).send(60, 0.3)
    assert step.answered + step.refused + sum(step.errors.values()) == step.sent
    assert step.refused > 0 and list(step.errors) == ["500: broken"]
    assert step.slowest_refusal_ms > 0
    assert not step.keeps(1e9)  # some were neither answered nor refused


@pytest.mark.parametrize(("refused", "kept"), [(0, True), (1, True), (3, False)])
def test_a_refused_request_is_slower_than_any_target(images, refused, kept):
    with Server(lambda number, _: (503, "full") if number < refused else good(0)) as server:
        step = Client(server.url, images).send(1000, 0.2)
    assert step.sent > 150 and step.refused == refused  # so 1 % is one request, or two
    assert step.keeps(60_000) == kept and not step.keeps(0)
    assert (step.p99_of_sent_ms is None) == (not kept)


def test_nobody_there_or_not_ready_is_one_clear_line(images):
    with pytest.raises(UnsupportedError, match="vitopt serve"):
        Client("http://127.0.0.1:9", images)
    with Server(lambda *_: good(0), ready=False) as server, pytest.raises(UnsupportedError, match="not ready"):
        Client(server.url, images)
    with Server(lambda *_: good(0)) as server, pytest.raises(UnsupportedError, match="there are tiny"):
        Client(server.url, images, model="other")
    with pytest.raises(RecipeError, match="http://"):
        Client("127.0.0.1:8000", images)


@pytest.mark.parametrize(("status", "said"), [(401, "VITOPT_SERVE_TOKEN"), (404, "vitopt serve")])
def test_a_server_that_wants_a_token_or_is_another_one_is_told_apart(images, status, said):
    with Server(lambda *_: good(0), status=status) as server, pytest.raises(UnsupportedError, match=said):
        Client(server.url, images)


def test_arrivals_are_a_poisson_process():
    times = arrivals(50, 400, 0)
    assert (np.diff(times) > 0).all() and times[-1] < 400
    counts = np.histogram(times, bins=400, range=(0, 400))[0]
    assert counts.mean() == pytest.approx(50, rel=0.02)
    assert counts.var() == pytest.approx(50, rel=0.15)  # as many as the mean: Poisson
    assert not np.array_equal(arrivals(50, 1, 1), arrivals(50, 1, 2))


def test_the_highest_rate_that_keeps_the_target_is_found(monkeypatch, images):
    def send(self, rate, seconds, seed):
        return served(rate, p99_of_sent_ms=5.0 if rate <= 13.7 else None)

    monkeypatch.setattr(Client, "send", send)
    with Server(lambda *_: good(0)) as server:
        client = Client(server.url, images)
        for lone in (2.0, 30.0, 400.0):  # the first rates are above, near and below what is sought
            steps = client.highest_rate(450, 1, alone=latency(p50_ms=lone))
            best = max(one.rate for one in steps if one.keeps(450))
            assert 13.7 / 1.025 < best <= 13.7
            assert [one.rate for one in steps] == sorted(one.rate for one in steps)
        with pytest.raises(MeasurementError, match="4 ms"):
            client.highest_rate(4, 1, alone=latency())  # 5 ms without a load
        monkeypatch.setattr(Client, "send", lambda self, rate, *_: served(rate, errors={"lost": 1}))
        with pytest.raises(MeasurementError, match="higher --target-p99-ms"):
            client.highest_rate(450, 1, alone=latency())


def test_answers_under_load_are_held_against_the_image_s_own(images):
    own = {images.reader.content(row): number for number, row in enumerate(images.rows)}

    def learnt(_, body):
        return good(own[body] % 4, 50.0 + own[body], logits=[float(own[body]), 0.0, 0.0, 0.0])

    with Server(learnt) as server:
        client = Client(server.url, images)
        predictions = client.learn()
        assert predictions.logits[:, 0].tolist() == list(range(len(images)))
        assert predictions.image_sha256 == images.image_hashes
        assert client.send(100, 0.2).differing == 0
        server.answer = lambda number, body: learnt(number, images.reader.content(images.rows[0]))  # another's
        step = client.send(100, 0.3)
    others = [body for body in server.bodies[-step.sent :] if own[body] > 1]  # half a point apart is the same
    assert step.differing >= len(others) > 5


def test_a_refusal_without_a_load_is_asked_again(images, monkeypatch):
    monkeypatch.setattr("vitopt.serve.load._PAUSE_S", 0)
    with Server(lambda number, _: (503, "full") if number % 2 else good(0, logits=[0.0] * 4)) as server:
        assert len(Client(server.url, images).learn().logits) == len(images)
    with Server(lambda *_: (503, "full")) as server, pytest.raises(MeasurementError, match="no room"):
        Client(server.url, images).learn()


def test_an_image_that_gets_no_answer_without_a_load_is_named(images):
    with Server(lambda *_: (400, {"error": "no image"})) as server, pytest.raises(MeasurementError, match="circle/00"):
        Client(server.url, images).learn()


def test_utilisation_energy_and_memory_are_those_of_the_server(images):
    looks = iter(range(1000))

    def metrics():
        passed = next(looks)
        return {
            "process_cpu_seconds_total": 0.1 * passed,
            'vitopt_model_cpu_seconds{model="tiny"}': 0.3 * passed,
            'vitopt_model_cpu_seconds{model="other"}': 100 * passed,
            'vitopt_model_busy_seconds_total{model="tiny"}': 0.2 * passed,
            "process_resident_memory_bytes": 1000 + passed,
            'vitopt_model_resident_bytes{model="tiny"}': 500,
            'vitopt_gpu_joules{model="tiny"}': 20.0 * passed,
            'vitopt_gpu_percent{model="tiny"}': 40 + 20 * passed,
        }

    with Server(lambda *_: good(0), metrics=metrics, record={"environment": {"cpu_count": 4}}) as server:
        step = Client(server.url, images).send(100, 0.5)  # two looks: before and after
    assert step.joules_per_answer == pytest.approx(20 / step.answered)
    assert (step.gpu_percent, step.peak_bytes) == (50, 1501)
    assert step.cpu_percent == pytest.approx(0.5 * step.busy_percent)  # twice the seconds, of 4 cores
    assert 0 < step.busy_percent < 100
    with Server(lambda *_: good(0)) as server:
        step = Client(server.url, images).send(100, 0.2)
    assert step.joules_per_answer is step.cpu_percent is step.peak_bytes is None


def test_a_load_becomes_a_record_that_compares_with_others(images, tmp_path):
    from commands import done

    of = {images.reader.content(row): label for row, label in zip(images.rows, images.labels, strict=True)}

    def answer(_, body):
        return good(of[body], logits=np.eye(4)[of[body]].tolist())

    said = {"variant": {"name": "/somewhere/tiny", "format": "bf16"}, "environment": {"processor": "far"}}
    with Server(answer, record=said, preprocessor="P", batch_ms={"1": 2.5, "4": 5.0}) as server:
        done("load", server.url, "--data", f"{images.name}:test", "--output", tmp_path / "load", *ARGUMENTS)
    record, predictions = load_record(tmp_path / "load"), load_predictions(tmp_path / "load")
    assert (record.variant.name, record.variant.format) == ("tiny over HTTP", "bf16")
    assert record.environment == said["environment"] and record.command is None
    assert record.accuracy.top1_percent == 100 and predictions.correct.all()
    assert record.dataset.sha256 == images.sha256 and record.dataset.preprocessor == "P"
    serving = record.serving
    assert serving.batch_ms == {1: 2.5, 4: 5.0} and [one.rate for one in serving.rates] == [40, 60]
    assert serving.highest_rate == 60 and serving.best is serving.rates[1]
    assert serving.cost_per_million == pytest.approx(cost_per_million(serving.best.answered_rate, 7.2))
    assert "own machine" in " ".join(record.warnings) and "joules_per_answer" in record.unmeasured


ARGUMENTS = ("--rates", "60,40", "--seconds", 1, "--target-p99-ms", 60_000, "--price-per-hour", 7.2)


def test_answers_that_are_not_the_image_s_own_are_a_warning(images):
    with Server(lambda *_: good(0, logits=[1.0, 0.0, 0.0, 0.0])) as server:
        client = Client(server.url, images)
        record = record_of(client, client.learn(), latency(), [served(9, differing=3), served(4, differing=0)])
    assert any(line.startswith("3 of 400 answers") for line in record.warnings)
    assert [one.rate for one in record.serving.rates] == [4, 9] and record.serving.highest_rate is None


def test_a_price_becomes_a_cost():
    # One dollar an hour at one request a second: 3,600 requests for a dollar.
    assert cost_per_million(1, 1) == pytest.approx(1e6 / 3600)
    assert load.cost_per_million(277.7778, 2.4) == pytest.approx(2.4, rel=1e-6)
