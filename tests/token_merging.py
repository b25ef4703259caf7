"""Token merging of one image by loops over single tokens, in float64: what the functions of tensors must give."""

import math

import torch


def merged_by_loops(
    hidden: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor, removed: int, protected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3 of arXiv 2210.09461 for one image, in float64: (tokens, width), (tokens,)."""
    first, second = range(protected, len(keys), 2), range(protected + 1, len(keys), 2)
    directions = [key / math.sqrt(sum(float(x) ** 2 for x in key)) for key in keys.double()]
    edges = []
    for a in first:
        similarities = [(float(directions[a] @ directions[b]), -b) for b in second]
        best, partner = max(similarities)
        edges.append((best, -a, -partner))
    groups = {token: [token] for token in range(len(keys))}
    for _, a, partner in sorted(edges, reverse=True)[:removed]:
        groups[partner] += groups.pop(-a)
    means, counts = [], []
    for token in sorted(groups):
        members = groups[token]
        count = sum(float(sizes[member]) for member in members)
        means.append(sum(float(sizes[member]) * hidden[member].double() for member in members) / count)
        counts.append(count)
    return torch.stack(means), torch.tensor(counts, dtype=torch.float64)
