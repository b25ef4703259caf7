import os
import threading

import numpy as np
import pytest

import vitopt.serve.model as module
from vitopt.serve.metrics import Metrics
from vitopt.serve.model import ServedModel
from vitopt.serve.process import Answers, Loading, ModelLost, Ready
from vitopt.serve.settings import ServeSpec

SIZE = (2, 2)


class FakeProcess:
    """Stands in for the model's process: the logits of an image are its first three values."""

    def __init__(self, loading, slots):
        self._pixels, self._read, self.calls = slots.pixels, os.pipe(), []
        self.sentinel, self.pid = self._read[0], 1
        self.hold = threading.Event()  # set: calls answer
        self.hold.set()
        self.dies = False
        self.paths = None  # as of an adaptive model, else

    def ready(self):
        return Ready({1: 0.01, 2: 0.012, 4: 0.014}, True, {"variant": {"name": "fake", "format": "fp32"}})

    def answers(self, slots, size):
        self.calls.append((list(slots), size))
        assert self.hold.wait(10)
        if self.dies:
            raise ModelLost("gone")
        return Answers(self._pixels[list(slots), :, 0, 0].copy(), self.paths and self.paths[: len(slots)])

    def stop(self):
        for end in self._read:
            os.close(end)


@pytest.fixture
def processes(monkeypatch):
    """The processes that were started, in order."""
    started = []

    def start(loading, slots):
        started.append(FakeProcess(loading, slots))
        return started[-1]

    monkeypatch.setattr(module, "ModelProcess", start)
    return started


@pytest.fixture
def model(processes):
    """Makes a model that is not started yet; settings as keywords."""

    def make(name="fake", metrics=None, **settings):
        spec = ServeSpec(**{"batch_sizes": (1, 2, 4), "queue": 8} | settings)
        metrics = metrics or Metrics(spec.batch_sizes)
        return ServedModel(name, Loading("fake", {}, "cpu", spec.batch_sizes), spec, SIZE, metrics)

    return make


def count(model, name, **labels):
    """A count of a model as Prometheus reads it."""
    return model._metrics.registry.get_sample_value(f"vitopt_{name}", {"model": model.name, **labels})


def image_of(number):
    """What writes an image that no other request has."""

    def write(pixels):
        pixels[:] = np.float32(number)

    return write
