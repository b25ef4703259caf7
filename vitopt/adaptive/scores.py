"""How sure a first pass is of each image, in a few tensor functions: the higher, the surer."""

from collections.abc import Callable

import torch

from vitopt.adaptive_spec import Proxy

# Of logits (images, classes), float32, to (images,).
OF_LOGITS: dict[Proxy, Callable[[torch.Tensor], torch.Tensor]] = {
    "margin": lambda logits: margin(logits),
    "entropy": lambda logits: -entropy(logits),
    "probability": lambda logits: logits.softmax(-1).amax(-1),
}


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the first class less that of the second: (images, classes) -> (images,), 0 to 1."""
    best = logits.softmax(-1).topk(2).values
    return best[:, 0] - best[:, 1]


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of the softmax, in nats: (images, classes) -> (images,)."""
    logarithms = logits.log_softmax(-1)
    return -(logarithms.exp() * logarithms).sum(-1)


def scores(proxy: Proxy, logits: torch.Tensor, steps: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """(images,), float32: how sure the first pass is, by one proxy.

    `logits`: (images, classes). `steps`: (images,), of the class token (`optimize.class_token`), for that proxy alone.
    """
    if proxy == "class_token":
        assert steps is not None
        return -steps.float()
    return OF_LOGITS[proxy](logits.float() / temperature)
