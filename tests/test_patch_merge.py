"""Merging patches that are alike: against a plain loop, and inside an encoder against the encoder run by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import tokcompile
from tests.members import members
from tests.zoo.vlm import VLMS, shallow
from tokcompile.errors import RecipeError
from tokcompile.measure.evaluate import controls
from tokcompile.passes.pruning.patch_merge import merged
from tokcompile.recipes import Recipe
from tokcompile.rewrite.selection import keep_mask


def by_hand(
    tokens: Tensor, like: Tensor, prefix: int, keep: int, sizes: Tensor | None = None, reach: int = 1000
) -> tuple[Tensor, list[list[int]], Tensor]:
    """One row, in plain loops: ``tokens [S, D]``, ``like [S, E]`` -> tokens that are left, what is in each, sizes."""
    sizes = torch.ones(len(tokens)) if sizes is None else sizes
    like = nn.functional.normalize(like, dim=-1)
    gives, takes = range(prefix, len(tokens), 2), range(prefix + 1, len(tokens), 2)
    pairs = []
    for a in gives:
        likest = max((b for b in takes if abs(a - b) <= reach), key=lambda b: (float(like[a] @ like[b]), -b))
        pairs.append((float(like[a] @ like[likest]), a, likest))
    pairs.sort(key=lambda pair: -pair[0])
    groups = {i: [i] for i in range(len(tokens))}
    for _, a, b in pairs[: len(tokens) - prefix - keep]:
        groups[b] += groups.pop(a)
    left = [sum(tokens[i] * sizes[i] for i in group) / sizes[group].sum() for group in groups.values()]
    return torch.stack(left), list(groups.values()), torch.stack([sizes[group].sum() for group in groups.values()])


@pytest.mark.parametrize("reach", [1, 3, None])
@pytest.mark.parametrize(("prefix", "size", "keep"), [(0, 12, 6), (1, 17, 9), (2, 15, 7), (1, 9, 8)])
def test_the_likest_pairs_become_their_mean(prefix: int, size: int, keep: int, reach: int | None) -> None:
    generator = torch.Generator().manual_seed(size)
    tokens, like = torch.randn(3, size, 5, generator=generator), torch.randn(3, size, 4, generator=generator)
    segment = torch.where(torch.arange(size) >= prefix, 0, -1)[None].expand(3, size)
    budget = torch.where(segment >= 0, keep, 0)
    new, scores, into, _ = merged(tokens, like, segment, budget, reach=reach)
    kept = keep_mask(scores, segment, budget)
    for row in range(3):
        wanted, groups, _ = by_hand(tokens[row], like[row], prefix, keep, reach=reach or size)
        assert torch.where(kept[row])[0].tolist() == [group[0] for group in groups]
        assert all(into[row, group].tolist() == [group[0]] * len(group) for group in groups)
        torch.testing.assert_close(new[row][kept[row]], wanted)


def test_equal_patches_merge_into_the_first_partner() -> None:
    tokens = torch.arange(6.0)[None, :, None].repeat(1, 1, 2)
    segment, budget = torch.zeros(1, 6, dtype=torch.int64), torch.full((1, 6), 4)
    new, scores, into, sizes = merged(tokens, torch.ones(1, 6, 3), segment, budget)
    kept = keep_mask(scores, segment, budget)[0]
    # all are alike: 0 stays by the order of ties, 2 and 4 go to the first odd patch
    assert kept.tolist() == [True, True, False, True, False, True]
    assert new[0, kept, 0].tolist() == pytest.approx([0, (1 + 2 + 4) / 3, 3, 5])
    assert into[0].tolist() == [0, 1, 1, 3, 1, 5]
    assert sizes[0, kept].tolist() == [1, 3, 1, 1]


def test_means_weigh_each_patch_once() -> None:
    """Two stages: a token of three patches and one of two become the mean of five."""
    tokens = torch.tensor([[[2.0], [7.0]]])
    segment, budget = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), 1)
    new, _, _, sizes = merged(tokens, torch.ones(1, 2, 3), segment, budget, torch.tensor([[3.0, 2.0]]))
    assert new[0, 1, 0] == pytest.approx((3 * 2 + 2 * 7) / 5)
    assert sizes[0, 1] == 5


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=48,
        patch_size=8,
        hidden_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def step(**params: object) -> dict[str, object]:
    return {"recipe_version": 1, "steps": [{"pass": "patch_merge", "params": params}]}


class Biased(nn.Module):
    """The attention of one layer as a function of its input, with a bias for each key."""

    def __init__(self, attention: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.attention, self.bias = attention, bias

    def forward(self, hidden: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        parts = {n.rsplit(".", 1)[-1]: m for n, m in self.attention.named_modules() if isinstance(m, nn.Linear)}
        names = [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "dense")]
        q, k, v, o = (next(parts[n] for n in pair if n in parts) for pair in names)
        query, key, value = (m(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for m in (q, k, v))
        weights = (query @ key.transpose(-1, -2) / 8**0.5 + self.bias[:, None, None]).softmax(-1)
        return o((weights @ value).transpose(1, 2).flatten(2)), weights


@pytest.mark.parametrize("size_bias", members([False, True], [True]))
def test_an_encoder_with_merged_patches_equals_the_same_by_hand(vit: nn.Module, size_bias: bool) -> None:
    """Two stages, so that tokens of several patches merge again."""
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    layers = list(vit.layers if hasattr(vit, "layers") else vit.encoder.layer)
    with torch.no_grad():
        stream = vit.embeddings(pixels)
        inside = [[[i] for i in range(stream.shape[1])] for _ in range(2)]  # patches in each token of each row
        sizes, like, full = torch.ones(2, stream.shape[1]), stream, [stream]
        for number, layer in enumerate(copy.deepcopy(layers)):
            if number:
                keep = (20, 12)[number - 1]
                left = [by_hand(stream[row], like[row], 1, keep, sizes[row]) for row in range(2)]
                stream, sizes = torch.stack([x for x, _, _ in left]), torch.stack([n for _, _, n in left])
                inside = [
                    [[patch for i in group for patch in old[i]] for group in groups]
                    for old, (_, groups, _) in zip(inside, left, strict=True)
                ]
            if size_bias:
                layer.attention = Biased(layer.attention, sizes.log())
            keys: list[Tensor] = []
            projection = next(m for n, m in layer.named_modules() if n.endswith(("k_proj", "key")))
            hook = projection.register_forward_hook(lambda module, given, out, keys=keys: keys.append(out))
            stream = layer(stream)
            hook.remove()
            stream = stream[0] if isinstance(stream, tuple) else stream
            like = keys[0].unflatten(-1, (4, 8)).mean(2)
            full.append(torch.empty(2, 37, 32))
            for row in range(2):
                for token, patches in enumerate(inside[row]):
                    full[-1][row, patches] = stream[row, token]
        steps = {"keep": [20, 12], "at": [0.34, 0.67], "size_bias": size_bias}
        short = tokcompile.optimize(vit, step(**steps, restore=False), lowering="eager")
        torch.testing.assert_close(
            short(pixel_values=pixels).last_hidden_state, vit.layernorm(stream), rtol=1e-5, atol=1e-5
        )
        found = tokcompile.optimize(vit, step(**steps), lowering="eager")(
            pixel_values=pixels, output_hidden_states=True
        )
        torch.testing.assert_close(found.last_hidden_state, vit.layernorm(full[-1]), rtol=1e-5, atol=1e-5)
        # what leaves between the layers is restored with the merges up to there
        for one, wanted in zip(found.hidden_states[:3], full, strict=False):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
    assert stream.shape[1] == 13
    assert sizes.sum(1).tolist() == [37, 37]


class Gridded(nn.Module):
    """Layers, and a head that folds the patches back into their grid."""

    def __init__(self, between: bool = False) -> None:
        super().__init__()
        make = nn.TransformerEncoderLayer
        self.patch, self.between = nn.Conv2d(3, 32, 8, 8), between
        self.layers = nn.ModuleList(make(32, 4, 64, batch_first=True, norm_first=True) for _ in range(4))
        self.head = nn.Conv2d(32, 32, 3, padding=1)

    def grid(self, x: Tensor) -> Tensor:
        return self.head(x.transpose(1, 2).unflatten(2, (6, 6)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        for number, layer in enumerate(self.layers):
            if self.between and number == 2:
                x = x + self.grid(x).flatten(2).transpose(1, 2)
            x = layer(x)
        return x if self.between else self.grid(x)


def test_a_head_that_reads_the_grid_gets_it() -> None:
    torch.manual_seed(0)
    model, pixels = Gridded().eval(), torch.randn(2, 3, 48, 48)
    headless = copy.deepcopy(model)
    headless.grid = lambda x: x
    with torch.no_grad():
        tokens = tokcompile.optimize(headless, step(keep=[20], at=[0.5]), lowering="eager")(pixel_values=pixels)
        assert len(tokens[0].unique(dim=0)) == 20 < tokens.shape[1] == 36
        found = tokcompile.optimize(model, step(keep=[20], at=[0.5]), lowering="eager")(pixel_values=pixels)
        torch.testing.assert_close(found, model.grid(tokens), rtol=1e-5, atol=1e-5)
    with pytest.raises(tokcompile.NoMatchError, match="grid"):
        tokcompile.optimize(model, step(keep=[20], at=[0.5], restore=False), lowering="eager")(pixel_values=pixels)


def test_the_tower_of_a_vlm_gives_as_many_features_as_before() -> None:
    """They leave in front of its last layer; the language model finds one for each of its places."""
    case = shallow(VLMS["llava"]())
    inputs = case.inputs(batch=2)
    with torch.no_grad():
        model = tokcompile.optimize(case.model, step(keep=[0.6], at=[0.34]), lowering="eager")
        found = model.get_image_features(pixel_values=inputs["pixel_values"])
        for image in found.pooler_output:
            assert image.shape[0] == 16
            assert len(image.unique(dim=0)) == 10
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        del inputs["pixel_values"]
        wanted = case.model.generate(**inputs, mm_encoder_outputs={"image": found}, max_new_tokens=4, do_sample=False)
        assert torch.equal(said, wanted)


def test_a_refused_step_leaves_the_graph_to_the_next() -> None:
    """A grid between the layers: no merging above it, and below it all goes well."""
    torch.manual_seed(0)
    model, pixels = Gridded(between=True).eval(), torch.randn(2, 3, 48, 48)
    below = step(keep=[20], at=[0.75])
    both = {
        "recipe_version": 1,
        "steps": [{"pass": "patch_merge", "params": {"keep": [20], "at": [0.25]}}, *below["steps"]],
    }
    with torch.no_grad():
        found = tokcompile.optimize(model, both, lowering="eager", on_no_match="ignore")
        torch.testing.assert_close(
            found(pixel_values=pixels), tokcompile.optimize(model, below, lowering="eager")(pixel_values=pixels)
        )
    first, second = tokcompile.report(found).steps
    assert (first.matches, second.matches) == (0, 1)


def test_keeping_all_changes_nothing(vit: nn.Module) -> None:
    pixels = torch.randn(2, 3, 48, 48)
    model = tokcompile.optimize(vit, step(keep=[1.0], at=[0.5]), lowering="eager")
    with torch.no_grad():
        found, wanted = model(pixel_values=pixels).last_hidden_state, vit(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # a bias of 0 takes another attention kernel


def test_a_bias_is_refused_where_it_cannot_be_added() -> None:
    class Capped(nn.Module):
        """Layers with a soft cap on their logits."""

        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 32, 8, 8)
            self.layers = nn.ModuleList(
                nn.ModuleDict(
                    {
                        "norm": nn.LayerNorm(32),
                        "qkv": nn.Linear(32, 96),
                        "out": nn.Linear(32, 32),
                        "norm2": nn.LayerNorm(32),
                        "up": nn.Linear(32, 64),
                        "down": nn.Linear(64, 32),
                    }
                )
                for _ in range(3)
            )

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.patch(pixel_values).flatten(2).transpose(1, 2)
            for layer in self.layers:
                q, k, v = layer["qkv"](layer["norm"](x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
                weights = (torch.tanh(q @ k.transpose(-1, -2) / 8**0.5 / 30) * 30).softmax(-1)
                x = x + layer["out"]((weights @ v).transpose(1, 2).flatten(2))
                x = x + layer["down"](nn.functional.gelu(layer["up"](layer["norm2"](x))))
            return x

    torch.manual_seed(0)
    model, pixels = Capped().eval(), torch.randn(2, 3, 48, 48)
    with pytest.raises(tokcompile.NoMatchError, match=r"soft cap.*size_bias: false"):
        tokcompile.optimize(model, step(keep=[0.5], at=[0.5]), lowering="eager")(pixel_values=pixels)
    plain = tokcompile.optimize(model, step(keep=[0.5], at=[0.5], size_bias=False, restore=False), lowering="eager")
    assert plain(pixel_values=pixels).shape[1] == 18


def test_less_than_half_in_one_stage_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least half"):
        Recipe.load(step(keep=[0.4], at=[0.5]))


def test_controls_have_its_budget() -> None:
    found = controls(Recipe.load(step(keep=[0.7, 0.6], at=[0.25, 0.5])))
    assert [c.role for c in found] == ["random"] * 3 + ["pool"]
    assert {str(c.recipe.steps[0].params.at) for c in found if c.recipe} == {"[0.25, 0.5]"}
