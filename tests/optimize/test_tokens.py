"""Merging and pruning against loops over single tokens in float64."""

import pytest
import torch
from token_merging import merged_by_loops

from vitopt.optimize import tokens


@pytest.mark.parametrize(
    ("count", "protected", "removed", "compiled"),
    [(17, 1, 8, False), (18, 1, 5, False), (18, 2, 8, False), (9, 2, 1, False), (5, 1, 0, False), (18, 1, 5, True)],
)
def test_merging_is_that_of_the_paper(count: int, protected: int, removed: int, compiled: bool) -> None:
    torch.manual_seed(count + removed)
    hidden, keys = torch.randn(3, count, 12), torch.randn(3, count, 6)
    sizes = torch.randint(1, 5, (3, count)).float()
    merge = torch.compile(tokens.merge, dynamic=False) if compiled else tokens.merge
    found, counts = merge(hidden, sizes, keys, removed, protected)
    assert found.shape == (3, count - removed, 12) and counts.dtype == torch.float32
    for image in range(3):
        expected = merged_by_loops(hidden[image], sizes[image], keys[image], removed, protected)
        torch.testing.assert_close(found[image].double(), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(counts[image].double(), expected[1], rtol=0, atol=0)
    torch.testing.assert_close(found[:, :protected], hidden[:, :protected], rtol=0, atol=0)


def test_unknown_sizes_are_ones_and_nothing_leaves_unchanged() -> None:
    torch.manual_seed(0)
    hidden, keys = torch.randn(2, 11, 8), torch.randn(2, 11, 4)
    found = tokens.merge(hidden, None, keys, 4, 1)
    expected = tokens.merge(hidden, torch.ones(2, 11), keys, 4, 1)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(tokens.merge(hidden, None, keys, 0, 1)[0], hidden)


def test_of_equally_similar_tokens_the_first_merge() -> None:
    hidden = torch.arange(9.0)[None, :, None].expand(1, 9, 1)
    found, sizes = tokens.merge(hidden, None, torch.ones(1, 9, 3), 2, 1)
    # All keys are alike: tokens 1 and 3 join token 2.
    assert found[0, :, 0].tolist() == [0, 2, 4, 5, 6, 7, 8] and sizes[0].tolist() == [1, 3, 1, 1, 1, 1, 1]


def test_an_average_in_16_bit_leaves_lone_tokens_as_they_are() -> None:
    torch.manual_seed(0)
    hidden, keys = torch.randn(2, 17, 8, dtype=torch.bfloat16), torch.randn(2, 17, 4)
    found, sizes = tokens.merge(hidden, None, keys, 6, 1)
    places = tokens.merged_places(keys, 6, 1)
    assert found.dtype == torch.bfloat16
    for image, token in (sizes == 1).nonzero().tolist():
        (source,) = (places[image] == token).nonzero()[0].tolist()
        assert torch.equal(found[image, token], hidden[image, source])


@pytest.mark.parametrize(("removed", "protected"), [(5, 1), (8, 2), (1, 1), (0, 1)])
def test_pruning_keeps_what_the_class_token_looks_at(removed: int, protected: int) -> None:
    torch.manual_seed(removed)
    hidden, attention = torch.randn(3, 17, 8), torch.rand(3, 17)
    attention[:, 5] = attention[:, 9]  # of the same attention the first stays
    found, fused = (make(hidden, attention, removed, protected) for make in (tokens.prune, tokens.prune_into_one))
    for image in range(3):
        order = sorted(range(protected, 17), key=lambda token: (-float(attention[image, token]), token))
        kept = [*range(protected), *sorted(order[: len(order) - removed])]
        assert torch.equal(found[image], hidden[image, kept])
        assert torch.equal(fused[image, :-1], hidden[image, kept])
        if removed:
            gone = order[len(order) - removed :]
            share = attention[image, gone].double()
            mean = (share[:, None] * hidden[image, gone].double()).sum(0) / share.sum()
            torch.testing.assert_close(fused[image, -1].double(), mean, rtol=0, atol=1e-6)


def test_the_attention_of_the_class_token_is_the_mean_of_its_heads() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    scores = query.double() @ key.double().transpose(2, 3) * 0.3
    expected = scores.softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(tokens.class_attention(query, key, 0.3).double(), expected, rtol=0, atol=1e-6)


def test_a_token_with_its_size_as_bias_attends_as_so_many_equal_ones() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, count, 4) for count in (5, 3, 3))
    sizes = torch.tensor([[1.0, 3.0, 2.0]])
    repeated = [torch.repeat_interleave(one, sizes[0].long(), 2) for one in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated)
    bias = tokens.size_bias(sizes, torch.float32)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
