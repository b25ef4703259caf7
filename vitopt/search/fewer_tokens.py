"""A schedule of token merging by measurement: what each block loses by it alone, and whole schedules on images.

The images are divided: some score blocks and choose the schedule by its KL divergence from the model with all tokens,
the others tell what it and the simple schedules of the same arithmetic lose.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor
from vitopt.environment import devices, machine
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.measure.bootstrap import FEWEST, percentile_interval, positive_mean_interval, resampled_images
from vitopt.measure.intervals import Interval
from vitopt.measure.logit_statistics import kl_divergences
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor
from vitopt.models.forward import flops_per_image
from vitopt.models.names import block_names
from vitopt.optimize.hybrid import Boundary, Hybrid
from vitopt.optimize.reduction import protected_tokens, reduce_tokens, set_removed, token_counts
from vitopt.recipe import RunSpec
from vitopt.search.confirmation import divide
from vitopt.search.schedule import Costs, Removed, fewest, neighbours, proposed, smallest
from vitopt.search.sensitivity import DEFAULT_MEMORY_BYTES, Calibration, calibration_of
from vitopt.section import Section
from vitopt.token_schedule import removed_in, written

TOKENS_SCHEMA = "vitopt.tokens/1"
_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of a block's patches that leave it when it is scored
_STEPS = (1, 2, 3, 4, 6)  # most blocks that merge, for schedules that are proposed beside one without such a limit
_AMOUNTS = 48  # into so many parts patches are divided: tokens that leave a block are multiples of one
_LOOKS = 40  # schedules that are measured at most
_RESAMPLES = 2_000
_MERGING = RunSpec(merge_tokens="1@0")


class Tried(Section):
    """One schedule, on the images that choose."""

    schedule: str
    flops_share: float = Field(description="FLOPs over those with all tokens, both as the record counts them")
    kl: float = Field(description="mean KL(all tokens || schedule), nats")


class Confirmed(Tried):
    """One schedule, on the images that chose nothing."""

    kind: Literal["searched", "constant", "falling"]
    agreement_percent: float = Field(description="images with the same class as with all tokens")
    kl_ci95: tuple[float, float] | None = Field(description="null under 30 images")
    kl_above_searched: float | None = Field(
        None, description="mean over images of its KL minus that of the searched one, nats; null for that one"
    )
    kl_above_searched_ci95: tuple[float, float] | None = Field(
        None, description="of that mean; null under 30 images, or where no two of them differ"
    )


class TokenSearch(Section):
    """Outcome of a search for a schedule, with all that was tried."""

    schema_: str = Field(TOKENS_SCHEMA, alias="schema")
    checkpoint: str
    checkpoint_sha256: str
    target_flops: float
    chosen: str = Field(description="the schedule, as `merge_tokens` takes it")
    choosing_images: int
    confirming_images: int
    confirmed: tuple[Confirmed, ...] = Field(description="the chosen schedule first")
    damage: dict[str, dict[int, float]] = Field(description="block -> tokens that leave it alone -> KL, nats")
    tried: tuple[Tried, ...] = Field(description="in order")
    dataset: str
    dataset_sha256: str
    seconds: float
    environment: dict[str, Any] = Field(default_factory=dict)

    model_config = Section.model_config | {"populate_by_name": True}

    def to_json(self) -> dict[str, Any]:
        """Plain data as stored."""
        return self.model_dump(mode="json", by_alias=True)


def find_schedule(
    checkpoint: Checkpoint,
    images: ImageSet,
    target_flops: float,
    *,
    steps: int | None = None,
    device: str = "auto",
    batch_size: int = 32,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> TokenSearch:
    """The schedule of merging with the lowest KL whose FLOPs are at most `target_flops` of those with all tokens.

    One image in four chooses. `steps`: most blocks that merge; fewer, larger steps take less time for the same FLOPs.

    Raises:
        UnsupportedError: this family needs all its tokens, or the labels do not exclude each other.
        RecipeError: no schedule saves so much.
        DataError: there are too few images, or one cannot be decoded.
    """
    started = time.perf_counter()
    target = devices.resolve_device(device)
    if checkpoint.config.problem_type == "multi_label_classification":
        raise UnsupportedError(f"{checkpoint.source} has labels that do not exclude each other, so no KL to search by")
    costs = costs_of(checkpoint)
    simple = _simple(costs, target_flops)
    _require_possible(costs, target_flops, steps)
    choosing, confirming = divide(images)
    model = load_model(checkpoint, device=target)
    names = block_names(model, checkpoint.config.model_type)
    reduce_tokens(model, names, _MERGING)
    preprocess = Preprocessor(load_processor(checkpoint))
    first, second = (calibration_of(part, preprocess, target, batch_size) for part in (choosing, confirming))
    hybrid = Hybrid(model, model, names)
    # Before the search, as an image that cannot be decoded ends it.
    (exact,) = _logits_of(hybrid, second, [(0,) * costs.blocks])
    with storage.temporary_folder() as folder:
        looks = _Looks(hybrid, first, costs, Boundary(folder, memory_bytes))
        damage = looks.damage()
        best = _search(looks, damage, target_flops, steps, list(simple.values()))
    kinds = {"searched": best, **simple}
    found = dict(zip(kinds, _logits_of(hybrid, second, list(kinds.values())), strict=True))
    return TokenSearch(
        checkpoint=checkpoint.source,
        checkpoint_sha256=checkpoint.fingerprint(),
        target_flops=target_flops,
        chosen=written(best),
        choosing_images=len(choosing),
        confirming_images=len(confirming),
        confirmed=tuple(_confirmed(exact, found, kinds, costs, confirming.groups)),
        damage={f"block.{block}": found for block, found in damage.items()},
        tried=tuple(
            Tried(schedule=written(removed), flops_share=costs.share(removed), kl=kl)
            for removed, kl in looks.tried.items()
        ),
        dataset=images.name,
        dataset_sha256=images.sha256,
        seconds=round(time.perf_counter() - started, 1),
        environment=machine.describe(target),
    )


def costs_of(checkpoint: Checkpoint) -> Costs:
    """FLOPs of a checkpoint's blocks for any number of tokens, a multiply-add as two: what its record counts.

    Raises:
        UnsupportedError: this family needs all its tokens.
    """
    config = checkpoint.config
    tokens, protected = token_counts(config, _MERGING)[0], protected_tokens(config)
    width, blocks = config.hidden_size, config.num_hidden_layers

    def flops(given: int, removed: int) -> int:
        left, patches = given - removed, given - protected
        projections, attention = 8 * given * width**2, 4 * given**2 * width
        mlp = 4 * left * width * config.intermediate_size
        matching = 2 * -(-patches // 2) * (patches // 2) * width // config.num_attention_heads
        averaging = 2 * left * given * width
        return int(projections + attention + mlp + (matching + averaging if removed else 0))

    rest = flops_per_image(checkpoint) - blocks * flops(tokens, 0)
    return Costs(tokens, protected, blocks, flops, rest)


class _Looks:
    """Schedules measured on the choosing images: each once, from the blocks' first input on."""

    def __init__(self, hybrid: Hybrid, calibration: Calibration, costs: Costs, inputs: Boundary):
        self.hybrid, self.costs = hybrid, costs
        self._calibration, self._inputs = calibration, inputs
        self.tried: dict[Removed, float] = {}
        set_removed(hybrid.base, hybrid.blocks, (0,) * costs.blocks)
        for index, pixels in enumerate(calibration.stream()):
            inputs[index] = hybrid.block_input(pixels, 0)
        self._exact = self._logits(0)

    def damage(self) -> dict[int, dict[int, float]]:
        """KL of merging in one block alone: block -> tokens -> nats. A block's input is kept for all that it tries."""
        found: dict[int, dict[int, float]] = {}
        patches = self.costs.tokens - self.costs.protected
        amounts = sorted({max(1, int(share * patches)) for share in _SHARES})
        embedded = [self._inputs[index] for index in range(self._calibration.count)]
        for block in progress.track(range(self.costs.blocks - 1), "scoring blocks", self.costs.blocks - 1):
            found[block] = {}
            for amount in amounts:
                set_removed(self.hybrid.base, self.hybrid.blocks, _alone(amount, block, self.costs.blocks))
                found[block][amount] = self._kl(self._logits(block))
            set_removed(self.hybrid.base, self.hybrid.blocks, (0,) * self.costs.blocks)
            for index in range(self._calibration.count):
                self._inputs[index] = self.hybrid.advance(self._inputs[index], block)
        for index, hidden in enumerate(embedded):
            self._inputs[index] = hidden
        return found

    def kl(self, removed: Removed) -> float:
        """Mean KL of a whole schedule, nats."""
        if removed not in self.tried:
            set_removed(self.hybrid.base, self.hybrid.blocks, removed)
            self.tried[removed] = self._kl(self._logits(0))
        return self.tried[removed]

    def _logits(self, block: int) -> torch.Tensor:
        every = range(self._calibration.count)
        return torch.cat([self.hybrid.logits_from(self._inputs[index], block) for index in every])

    def _kl(self, logits: torch.Tensor) -> float:
        return float(kl_divergences(self._exact.numpy(), logits.numpy()).mean())


def _search(
    looks: _Looks,
    damage: Mapping[int, Mapping[int, float]],
    target_flops: float,
    steps: int | None,
    simple: Sequence[Removed],
) -> Removed:
    """The schedule of lowest measured KL: of what is proposed and the `simple` ones, then of what is near."""
    costs = looks.costs
    grid = max(1, (costs.tokens - costs.protected) // _AMOUNTS)
    limits = [most for most in (*_STEPS, steps or costs.blocks) if steps is None or most <= steps]
    first = [proposed(costs, damage, target_flops, most, grid) for most in limits]
    allowed = [one for one in (*first, *simple) if one and _within(one, steps)] or [fewest(costs, steps)]
    best = min(dict.fromkeys(allowed), key=looks.kl)
    with progress.task("measuring schedules", _LOOKS) as bar:
        better = True
        while better:
            better = False
            for near in neighbours(best, costs, target_flops, grid):
                if len(looks.tried) >= _LOOKS:
                    return best
                new = near not in looks.tried
                if _within(near, steps) and looks.kl(near) < looks.kl(best):
                    best, better = near, True
                bar.advance(int(new))
                if better:
                    break
    return best


def _simple(costs: Costs, target_flops: float) -> dict[str, Removed]:
    """The constant and the falling schedule that just reach the target, by their kind; without those that never do."""
    numbers = range(1, costs.tokens)
    forms = {"constant": "{}", "falling": "{}..0"}
    found = {}
    for kind, form in forms.items():
        schedules = (removed_in(form.format(number), costs.blocks) for number in numbers)
        if removed := smallest(schedules, costs, target_flops):
            found[kind] = removed
    return found


def _require_possible(costs: Costs, target_flops: float, steps: int | None) -> None:
    """Refuse, before anything is measured, a target that no schedule of so many steps reaches.

    Raises:
        RecipeError: it is such a target.
    """
    least = costs.share(fewest(costs, steps))
    if least > target_flops:
        limit, remedy = ("", "") if steps is None else (f" in at most {steps} of the blocks", ", or more steps")
        raise RecipeError(
            f"no schedule{limit} leaves {target_flops:g} of the FLOPs, the least is {least:.3f}: allow more{remedy}"
        )


def _within(removed: Removed, steps: int | None) -> bool:
    return steps is None or sum(map(bool, removed)) <= steps


def _logits_of(hybrid: Hybrid, calibration: Calibration, schedules: Sequence[Removed]) -> list[NDArray[np.float32]]:
    """(images, classes) of each schedule."""
    logits: list[list[torch.Tensor]] = [[] for _ in schedules]
    for pixels in progress.track(calibration.stream(), "confirming", calibration.count):
        for found, removed in zip(logits, schedules, strict=True):
            set_removed(hybrid.base, hybrid.blocks, removed)
            found.append(hybrid.logits(pixels))
    return [torch.cat(found).numpy() for found in logits]


def _confirmed(
    exact: NDArray[np.float32],
    found: Mapping[str, NDArray[np.float32]],
    kinds: Mapping[str, Removed],
    costs: Costs,
    groups: Sequence[str] | None,
) -> Iterator[Confirmed]:
    """What schedules lose, by their kind, whose logits were `found`."""
    kl = {kind: kl_divergences(exact, logits) for kind, logits in found.items()}
    for kind, removed in kinds.items():
        above = None if kind == "searched" else kl[kind] - kl["searched"]
        yield Confirmed.model_validate(
            {
                "kind": kind,
                "schedule": written(removed),
                "flops_share": costs.share(removed),
                "kl": float(kl[kind].mean()),
                "kl_ci95": _limits(positive_mean_interval(kl[kind])),
                "kl_above_searched": None if above is None else float(above.mean()),
                "kl_above_searched_ci95": None if above is None else _limits(_mean_interval(above, groups)),
                "agreement_percent": 100 * float((exact.argmax(1) == found[kind].argmax(1)).mean()),
            }
        )


def _mean_interval(differences: NDArray[np.floating], groups: Sequence[str] | None) -> Interval | None:
    """95 % interval of the mean over images, of whole groups; None under 30 images, or where none differ."""
    if len(differences) < FEWEST:
        return None
    drawn = resampled_images(len(differences), groups, resamples=_RESAMPLES)
    return percentile_interval([float(differences[rows].mean()) for rows in drawn])


def _limits(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def _alone(amount: int, block: int, blocks: int) -> Removed:
    return tuple(amount if each == block else 0 for each in range(blocks))
