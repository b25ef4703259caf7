"""Models with fewer tokens in their blocks: the same answers without a step, those of a loop over blocks with some."""

from collections.abc import Callable

import pytest
import torch
from token_merging import merged_by_loops
from torch import nn

from vitopt.data.pixels import random_pixels
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model
from vitopt.models.families import FAMILIES
from vitopt.models.names import block_names
from vitopt.optimize.reduction import reduce_tokens, set_removed, token_counts
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
PIXELS = random_pixels(3, (32, 32))
REDUCED = ("vit", "deit", "vit_msn")


def prepared(checkpoint: Checkpoint, **run: object) -> TorchRunnable:
    return prepare(checkpoint, name="mine", device=CPU, run=RunSpec(**run))


def in_float64(checkpoint: Checkpoint, pixels: torch.Tensor, removed: tuple[int, ...], bias: bool) -> torch.Tensor:
    """Logits of a ViT whose blocks merge tokens, one image and one head after the other in float64."""
    model = load_model(checkpoint).double()
    heads, logits = model.config.num_attention_heads, []
    for image in pixels.double():
        hidden = model.vit.embeddings(image[None])[0]
        sizes = torch.ones(len(hidden), dtype=torch.float64)
        for layer, gone in zip(model.vit.layers, removed, strict=True):
            normed, attention = layer.layernorm_before(hidden), layer.attention
            q, k, v = (p(normed).chunk(heads, -1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            attended = []
            for one in range(heads):
                scores = q[one] @ k[one].T * attention.scaling + (sizes.log() if bias else 0)
                attended.append(scores.softmax(-1) @ v[one])
            hidden = hidden + attention.o_proj(torch.cat(attended, -1))
            if gone:
                hidden, sizes = merged_by_loops(hidden, sizes, sum(k) / heads, gone, 1)
            hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
        logits.append(model.classifier(model.vit.layernorm(hidden)[0]))
    return torch.stack(logits)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("schedule", "removed"), [("5", (5, 5, 0)), ("8@0_3@1", (8, 3, 0)), ("6@1", (0, 6, 0))])
def test_a_merged_model_gives_the_answers_of_a_loop_in_float64(
    schedule: str, removed: tuple[int, ...], bias: bool, tiny: Checkpoint
) -> None:
    with torch.inference_mode():
        expected = in_float64(tiny, PIXELS, removed, bias)
    found = prepared(tiny, merge_tokens=schedule, size_bias=bias)(PIXELS)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert (expected - prepared(tiny)(PIXELS)).abs().max() > 1e-2  # merging does something here


@pytest.mark.parametrize("options", [{}, {"fuse_qkv": True}, {"carry_residual": True}, {"class_token_last": True}])
def test_a_model_whose_blocks_remove_nothing_is_the_same_to_the_bit(options: dict[str, bool], tiny: Checkpoint) -> None:
    runnable = prepared(tiny, merge_tokens="1@0", **options)
    names = block_names(runnable.model, "vit")
    changed = runnable(PIXELS)
    set_removed(runnable.model, names, (0, 0, 0))
    assert torch.equal(runnable(PIXELS), prepared(tiny, **options)(PIXELS))
    assert not torch.equal(changed, runnable(PIXELS))


@pytest.mark.parametrize(
    "reduced", [{"merge_tokens": "5"}, {"prune_tokens": "5"}, {"prune_tokens": "5", "fuse_pruned": True}]
)
@pytest.mark.parametrize("run_as", [None, "w8a8"])
def test_fewer_tokens_combine_with_all_exact_options(
    run_as: str | None, reduced: dict[str, object], tiny: Checkpoint
) -> None:
    alone = prepared(tiny, run_as=run_as, **reduced)
    exact = dict.fromkeys(("fuse_qkv", "class_token_last", "carry_residual", "patch_product"), True)
    together = prepared(tiny, run_as=run_as, **reduced, **exact)
    expected, found = alone(PIXELS).float(), together(PIXELS).float()
    assert together.reasons == {} and (found - expected).norm() < (0.02 if run_as else 1e-5) * expected.norm()
    assert together.layers == alone.layers and together.weight_bytes() == alone.weight_bytes()


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_kernels_that_take_what_is_asked_give_the_same(kernel: str, tiny: Checkpoint) -> None:
    run = {"merge_tokens": "5", "size_bias": kernel == "math"}
    held = prepared(tiny, sdpa_kernel=kernel, **run)
    torch.testing.assert_close(held(PIXELS), prepared(tiny, **run)(PIXELS), rtol=0, atol=1e-4)
    assert held.attention_used == "sdpa" and held.kernel_used(PIXELS) == kernel


@pytest.mark.parametrize("fuse", [False, True])
def test_pruning_leaves_as_many_tokens_as_it_says(fuse: bool, tiny: Checkpoint) -> None:
    runnable, rows = prepared(tiny, prune_tokens="7@0_3@1", fuse_pruned=fuse), list[int]()
    for module in runnable.model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 128:  # fc1
            module.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    runnable(PIXELS)
    assert rows == [10, 7, 7]
    assert runnable.describe()["variant"].tokens == (17, 10, 7, 7)


def test_the_record_tells_tokens_and_counts_what_is_computed(tiny: Checkpoint) -> None:
    runnable, plain = prepared(tiny, merge_tokens="5@0"), prepared(tiny)
    told, whole = runnable.describe()["variant"], plain.describe()["variant"]
    assert told.tokens == (17, 12, 12, 12) and told.ran["merge_tokens"] == "5@0" and told.ran["size_bias"] is True
    assert whole.tokens is None and whole.ran["merge_tokens"] is whole.ran["size_bias"] is False
    width, mlp, head_width = 64, 128, 32

    def block(given: int, left: int) -> int:
        return 8 * given * width**2 + 4 * given**2 * width + 4 * left * width * mlp

    saved = 3 * block(17, 17) - block(17, 12) - 2 * block(12, 12)
    merging = 2 * 8 * 8 * head_width + 2 * 12 * 17 * width
    assert plain.flops_per_image() - runnable.flops_per_image() == saved - merging
    narrow = prepared(tiny, class_token_last=True)
    assert plain.flops_per_image() - narrow.flops_per_image() == (
        16 * (4 * width**2 + 4 * 17 * width + 4 * width * mlp)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_need_all_tokens_are_refused_by_name(family: str, make_family: Callable[..., Checkpoint]) -> None:
    checkpoint = make_family(family)
    if family in REDUCED:
        merged = prepared(checkpoint, merge_tokens="3")
        assert torch.isfinite(merged(PIXELS)).all() and not torch.equal(merged(PIXELS), prepared(checkpoint)(PIXELS))
        return
    with pytest.raises(UnsupportedError, match=f"merge_tokens.*{checkpoint.config.architectures[0]}"):
        prepared(checkpoint, merge_tokens="3")


def test_the_token_of_a_teacher_stays(make_family: Callable[..., Checkpoint]) -> None:
    checkpoint = make_family("deit", with_teacher=True)
    runnable = prepared(checkpoint, merge_tokens="8@0", size_bias=False)
    places = list[torch.Tensor]()
    block = runnable.model.deit.layers[0]
    block.layernorm_after.register_forward_pre_hook(lambda _, given: places.append(given[0]))
    runnable(PIXELS)
    plain = prepared(checkpoint)
    plain.model.deit.layers[0].layernorm_after.register_forward_pre_hook(lambda _, given: places.append(given[0]))
    plain(PIXELS)
    merged, whole = places
    assert merged.shape[1] == 10 and torch.equal(merged[:, :2], whole[:, :2])


@pytest.mark.parametrize(
    ("run", "word"),
    [
        ({"merge_tokens": "9@0"}, "block 0.*16 patches.*at most 8"),
        ({"merge_tokens": "8@0_5@1"}, "block 1.*8 patches.*at most 4"),
        ({"prune_tokens": "16@0"}, "at most 15"),
        ({"prune_tokens": "15@0", "fuse_pruned": True}, "at most 14"),
        ({"merge_tokens": "3@2"}, "block 2 .*last"),
    ],
)
def test_more_tokens_than_there_are_is_one_clear_line(run: dict[str, object], word: str, tiny: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=word) as caught:
        token_counts(tiny.config, RunSpec(**run))
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=word):
        prepared(tiny, **run)


def test_eager_attention_has_no_place_for_it(tiny: Checkpoint) -> None:
    model = load_model(tiny, attention="eager")
    with pytest.raises(UnsupportedError, match="sdpa"):
        reduce_tokens(model, block_names(model, "vit"), RunSpec(merge_tokens="3"))


def test_a_compiled_model_merges_the_same(tiny: Checkpoint) -> None:
    run = {"merge_tokens": "5", "fuse_qkv": True, "class_token_last": True, "carry_residual": True}
    compiled = prepared(tiny, compile=True, **run)
    torch.testing.assert_close(compiled(PIXELS), prepared(tiny, **run)(PIXELS), rtol=0, atol=1e-4)
    assert compiled.reasons == {} and compiled.fixed_shapes
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(PIXELS.flip(0)), compiled(PIXELS).flip(0), rtol=0, atol=1e-4)


def test_each_block_compiles_whole_as_a_graph_needs_it(tiny: Checkpoint) -> None:
    runnable, graphs = prepared(tiny, merge_tokens="5"), list[torch.fx.GraphModule]()
    expected = runnable(PIXELS)

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in runnable.model.vit.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(runnable(PIXELS), expected, rtol=0, atol=0)
    assert len(graphs) == 3  # of 17, 12 and 7 tokens
