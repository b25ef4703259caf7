"""Fewer tokens: which of them become one, which are dropped, and the tokens that are left. Functions of tensors alone.

All shapes are known beforehand: how many tokens leave is a number, never a threshold. Nothing is sorted and nothing
scattered. A rank is a sum of comparisons, and tokens are averaged by a product with the matrix that says for each where
it goes: a few small kernels that a compiler fuses, with the same result in every run.
"""

import torch


def merge(
    hidden: torch.Tensor, sizes: torch.Tensor | None, keys: torch.Tensor, removed: int, protected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: of every other token the `removed` most similar to one between join that one.

    A token is the mean of all the patches that it stands for. The order of what stays is kept, and the first
    `protected` tokens are left alone.

    `hidden`: (batch, tokens, width). `sizes`: (batch, tokens), patches that each token stands for, float32; None where
    each is one. `keys`: (batch, tokens, key width), what is compared, by cosine. Returns (batch, tokens - removed,
    width) and (batch, tokens - removed). `removed` is at most half of the tokens that are not protected.
    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3.
    """
    places = merged_places(keys, removed, protected)
    if sizes is None:
        sizes = hidden.new_ones(hidden.shape[:2], dtype=torch.float32)
    return averaged(hidden, sizes, places, hidden.shape[1] - removed)


def merged_places(keys: torch.Tensor, removed: int, protected: int) -> torch.Tensor:
    """Where each token goes: (batch, tokens), int64, from `keys`: (batch, tokens, key width); two that merge have one
    place. Of equally similar tokens the first is taken."""
    directions = torch.nn.functional.normalize(keys[:, protected:].float(), dim=-1)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(-1)
    joins = _ranks(best) < removed
    stays = keys.new_ones(keys.shape[:2], dtype=torch.int64)
    stays[:, protected::2] = (~joins).to(torch.int64)
    places = stays.cumsum(1) - 1
    joined = places[:, protected + 1 :: 2].gather(1, partner)
    places[:, protected::2] = torch.where(joins, joined, places[:, protected::2])
    return places


def averaged(
    hidden: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of the tokens that share a place, and the sums of their weights.

    `hidden`: (batch, tokens, width); `weights`: (batch, tokens), float32; `places`: (batch, tokens), below `count`.
    Returns (batch, count, width), in the type of `hidden`, and (batch, count), float32.
    """
    goes = places[:, None, :] == torch.arange(count, device=places.device)[None, :, None]
    shares = torch.where(goes, weights[:, None, :], 0.0)  # (batch, count, tokens)
    sums = shares.sum(-1)
    return (shares / sums[..., None]).to(hidden.dtype) @ hidden, sums


def prune(hidden: torch.Tensor, attention: torch.Tensor, removed: int, protected: int) -> torch.Tensor:
    """Drop the `removed` tokens that the class token attends to least; the order of what stays is kept.

    `hidden`: (batch, tokens, width). `attention`: (batch, tokens), of the class token. The first `protected` tokens
    stay. Returns (batch, tokens - removed, width). Of tokens with the same attention the first stays.
    Source: Liang et al., "Not All Patches are What You Need" (EViT), ICLR 2022, arXiv 2202.07800, section 3.2.
    """
    stays = _stays(attention, removed, protected)
    # A kept token's number is its place: each place finds the token whose number it is.
    places = torch.where(stays, stays.to(torch.int64).cumsum(1) - 1, -1)
    count = hidden.shape[1] - removed
    goes = places[:, None, :] == torch.arange(count, device=places.device)[None, :, None]
    tokens = torch.where(goes, torch.arange(hidden.shape[1], device=places.device), 0).sum(-1)
    return hidden.gather(1, tokens[..., None].expand(-1, -1, hidden.shape[2]))


def prune_into_one(hidden: torch.Tensor, attention: torch.Tensor, removed: int, protected: int) -> torch.Tensor:
    """As `prune`, but what leaves becomes one token more, the last: its mean weighted by `attention`.

    Returns (batch, tokens - removed + 1, width).
    """
    stays = _stays(attention, removed, protected)
    count = hidden.shape[1] - removed
    places = torch.where(stays, stays.to(torch.int64).cumsum(1) - 1, count)
    return averaged(hidden, attention.float(), places, count + 1)[0]


def class_attention(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of the first token to all, the mean of its heads.

    `query`, `key`: (batch, heads, tokens, head width). Returns (batch, tokens), float32, that sums to 1.
    """
    scores = (query[:, :, :1] @ key.transpose(2, 3)).float() * scaling
    return scores.softmax(-1).mean(1)[:, 0]


def size_bias(sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds to its scores so that a token counts as the patches that it stands for: log of its size.

    `sizes`: (batch, tokens). Returns (batch, 1, 1, tokens). Source: arXiv 2210.09461, equation 1.
    """
    return sizes.log().to(dtype)[:, None, None, :]


def _stays(attention: torch.Tensor, removed: int, protected: int) -> torch.Tensor:
    ranks = _ranks(attention[:, protected:])
    stays = ranks < ranks.shape[1] - removed
    return torch.cat([stays.new_ones(len(stays), protected), stays], 1)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """How many scores are before each, the largest first, of equal ones the first: (batch, count) of the same."""
    order = torch.arange(scores.shape[1], device=scores.device)
    other, own = scores[:, None, :], scores[:, :, None]
    before = (other > own) | ((other == own) & (order[None, :] < order[:, None]))
    return before.sum(-1)
