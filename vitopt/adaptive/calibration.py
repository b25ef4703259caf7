"""Both passes over calibration images, and what they say of proxies and thresholds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitopt import progress
from vitopt.adaptive import thresholds
from vitopt.adaptive.calibrated import CurvePoint, ProxyRanking, Rule
from vitopt.adaptive.passes import Passes
from vitopt.adaptive.scores import OF_LOGITS, scores
from vitopt.adaptive_spec import Proxy, TargetSpec
from vitopt.data.images import ImageSet
from vitopt.data.pixels import batches, on_device
from vitopt.engines.runtime import Prepared
from vitopt.errors import DataError, UnsupportedError
from vitopt.measure.accuracy import padded_call
from vitopt.measure.intervals import wilson_interval
from vitopt.models.families import FAMILIES
from vitopt.optimize.runtime import TorchRunnable
from vitopt.recipe import CHOOSING

_FAR = 0.1  # share of the images whose class tokens are called far apart
_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


@dataclass(frozen=True)
class Observed:
    """Both passes over some images: `labels` (images,), logits (images, classes), and where they can be had the `steps`
    of the first pass's class token and the `distances` between those of both passes, (images,)."""

    labels: NDArray[np.int64]
    first: NDArray[np.float32]
    second: NDArray[np.float32]
    steps: NDArray[np.float32] | None = None
    distances: NDArray[np.float32] | None = None

    def part(self, indices: NDArray[np.intp]) -> "Observed":
        """The same of some images."""
        return Observed(*(None if a is None else a[indices] for a in vars(self).values()))  # type: ignore[arg-type]

    @property
    def first_right(self) -> NDArray[np.bool_]:
        """(images,)."""
        return self.first.argmax(1) == self.labels

    @property
    def second_right(self) -> NDArray[np.bool_]:
        """(images,)."""
        return self.second.argmax(1) == self.labels

    @property
    def lost(self) -> NDArray[np.bool_]:
        """(images,): right in the second pass and wrong in the first."""
        return self.second_right & ~self.first_right

    @property
    def changed(self) -> NDArray[np.bool_]:
        """(images,): of another class in the second pass."""
        return self.first.argmax(1) != self.second.argmax(1)

    @property
    def proxies(self) -> list[Proxy]:
        """Those that there are."""
        return [*OF_LOGITS, *(["class_token"] if self.steps is not None else [])]  # type: ignore[list-item]

    def scores(self, proxy: Proxy, temperature: float) -> NDArray[np.float64]:
        """(images,): how sure the first pass is, by one proxy."""
        steps = None if self.steps is None else torch.from_numpy(self.steps)
        # As the router computes them, to the bit: a threshold is one of these numbers.
        return scores(proxy, torch.from_numpy(self.first), steps, temperature).double().numpy()


@torch.inference_mode()
def observe(passes: Passes, images: ImageSet, batch_size: int = 32, skip_bad: bool = False) -> Observed:
    """Run both passes over all images.

    Raises:
        BadImageError: an image cannot be decoded and `skip_bad` is false.
        DataError: none can be decoded, or they have sets of labels.
    """
    if images.label_sets is not None:
        raise DataError(f"{images.name} has images with several labels, so no class is right: give one label for each")
    if images.groups is not None:  # images that depend on each other would count for more than they tell
        images = images.subset(sorted({group: i for i, group in reversed([*enumerate(images.groups)])}.values()))
    found: list[list[NDArray[np.float32]]] = []
    labels: list[int] = []
    batch_size = min(batch_size, len(images))
    with _embeddings(passes.first) as of_first, _embeddings(passes.second) as of_second:
        stream = batches(images, passes.second.preprocess, batch_size, skip_bad=skip_bad)
        with progress.task("both passes over calibration images", len(images)) as counted:
            for batch in on_device(stream, passes.second.device):
                counted.advance(len(batch.indices) + len(batch.bad))
                if not batch.indices:
                    continue
                logits, steps = passes.first_logits(batch.pixel_values)
                second = padded_call(passes.second, batch.pixel_values, batch_size)
                row = [logits, second, *([] if steps is None else [steps])]
                found.append([one.float().cpu().numpy() for one in (*row, *_distances(of_first, of_second))])
                labels += [images.labels[index] for index in batch.indices]
    if not found:
        raise DataError(f"none of the {len(images)} images of {images.name} can be decoded")
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    first, second_logits, *rest = columns
    watched = rest.pop(0) if steps is not None else None
    return Observed(np.array(labels), first, second_logits, watched, rest[0] if rest else None)


@contextmanager
def _embeddings(runnable: Prepared) -> Iterator[list[torch.Tensor]]:
    """What the head of a torch model took in its last call, (batch, width), as the only item of a list."""
    kept: list[torch.Tensor] = []
    hooks = []
    if isinstance(runnable, TorchRunnable):
        heads = FAMILIES[runnable.checkpoint.config.model_type].heads
        modules = dict(runnable.model.named_modules())

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            kept[:] = [inputs[0]]

        hooks = [modules[name].register_forward_pre_hook(keep) for name in heads if name in modules]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _distances(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[torch.Tensor]:
    """(images,), as the only item; nothing where the two are not of one kind."""
    if not first or not second or first[0].shape != second[0].shape:
        return []
    return [(first[0].float() - second[0].float()).norm(dim=1)]


def calibrate(observed: Observed, target: TargetSpec) -> tuple[Rule, str]:
    """The rule that `target` asks for, and in words what it promises.

    One image in four chooses the proxy and the temperature, the others the threshold; a rate, of which nothing is
    promised, is that of all.

    Raises:
        DataError: there are fewer than eight images.
        UnsupportedError: the proxy needs what was not observed.
    """
    if len(observed.labels) < 2 * CHOOSING:
        raise DataError(f"{len(observed.labels)} calibration images are too few to choose a threshold: give hundreds")
    if target.proxy not in ("auto", *observed.proxies):
        raise UnsupportedError(
            f"proxy {target.proxy} cannot be had here: the first pass gives logits alone, or has no class token"
        )
    by_class = np.argsort(observed.labels, kind="stable")
    choosing, fitting = observed.part(by_class[::CHOOSING]), observed.part(np.delete(by_class, np.s_[::CHOOSING]))
    temperature = thresholds.temperature(choosing.first, choosing.labels)
    proxy = target.proxy if target.proxy != "auto" else _best(choosing, temperature)
    found = (fitting if target.max_top1_loss else observed).scores(proxy, temperature)
    if target.max_top1_loss is None:
        assert target.escalation_rate is not None
        threshold = thresholds.at_rate(found, target.escalation_rate)
        interval = wilson_interval(int(np.sum(found < threshold)), len(found))
        limits = f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
        promise = (
            f"about {100 * target.escalation_rate:g} % of the images get the second pass: of {len(found):,} for "
            f"calibration {100 * np.mean(found < threshold):.1f} % ({limits})"
        )
        return Rule(proxy=proxy, threshold=threshold, temperature=temperature), promise
    tried = thresholds.candidates(choosing.scores(proxy, temperature))
    choice = thresholds.for_loss(tried, found, fitting.lost, target.max_top1_loss / 100, target.confidence)
    return Rule(proxy=proxy, threshold=choice.threshold, temperature=temperature), _promise(target, choice, len(found))


def _promise(target: TargetSpec, choice: thresholds.Choice, images: int) -> str:
    limit = f"top-1 is at most {target.max_top1_loss:g} points lower ({100 * target.confidence:g} %)"
    if choice.threshold is not None:
        return f"{limit}: of {images:,} calibration images at most {100 * choice.bound:.2f} % are lost"
    if choice.needed is not None:
        needed = math.ceil(choice.needed * CHOOSING / (CHOOSING - 1))
        return f"all images get the second pass: to show that {limit} takes {needed:,} calibration images or more"
    return f"all images get the second pass: that {limit} is shown for no smaller share of them"


def _best(observed: Observed, temperature: float) -> Proxy:
    """The proxy that ranks highest the images which the second pass answers otherwise; the first of equal ones."""

    def rank(proxy: Proxy) -> float:
        return thresholds.area_under_curve(observed.scores(proxy, temperature), observed.changed) or 0.0

    return max(observed.proxies, key=rank)


def rankings(observed: Observed, temperature: float) -> tuple[ProxyRanking, ...]:
    """How well each proxy ranks these images."""
    distances = observed.distances
    far = None if distances is None else distances > np.quantile(distances, 1 - _FAR)
    rows = []
    for proxy in observed.proxies:
        found = observed.scores(proxy, temperature)
        rows.append(
            ProxyRanking(
                proxy=proxy,
                auroc_changed=thresholds.area_under_curve(found, observed.changed),
                auroc_far=None if far is None else thresholds.area_under_curve(found, far),
                spearman=None if distances is None else thresholds.rank_correlation(found, distances),
            )
        )
    return tuple(rows)


def curve(observed: Observed, rule: Rule) -> tuple[CurvePoint, ...]:
    """Accuracy over the share of images that is escalated, from none to all in steps of 5 %."""
    found = observed.scores(rule.proxy, rule.temperature)
    points = []
    for rate in np.arange(0, 1.01, 0.05):
        threshold = float(np.quantile(found, rate)) if rate < 1 else float(np.nextafter(found.max(), np.inf))
        escalated = found < threshold
        right = np.where(escalated, observed.second_right, observed.first_right)
        points.append(
            CurvePoint(
                escalated_percent=100 * float(escalated.mean()),
                threshold=threshold,
                top1_percent=100 * float(right.mean()),
                lost_percent=100 * float((observed.second_right & ~right).mean()),
                gained_percent=100 * float((~observed.second_right & right).mean()),
            )
        )
    return tuple(points)


def summarised(observed: Observed, target: TargetSpec) -> dict[str, Any]:
    """Fields of `Calibrated`: the rule, what it promises, and all that was found out.

    Raises:
        DataError, UnsupportedError: as `calibrate`.
    """
    rule, promise = calibrate(observed, target)
    found, threshold = observed.scores(rule.proxy, rule.temperature), rule.threshold
    distances = None
    if observed.distances is not None:
        values = np.quantile(observed.distances.astype(np.float64), _QUANTILES)
        distances = {f"p{100 * q:g}": float(value) for q, value in zip(_QUANTILES, values, strict=True)}
    return {
        "rule": rule,
        "promise": promise,
        "images": len(observed.labels),
        "escalated": 1.0 if threshold is None else float(np.mean(found < threshold)),
        "first_top1_percent": 100 * float(observed.first_right.mean()),
        "second_top1_percent": 100 * float(observed.second_right.mean()),
        "proxies": rankings(observed, rule.temperature),
        "curve": curve(observed, rule),
        "distances": distances,
    }
