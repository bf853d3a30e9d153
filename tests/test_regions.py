"""Region detection on small modules: roles, variants, negative cases with their reason, and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo import capture_graphs, decoders, encoders, vision
from tokcompile.regions import KINDS, Regions, find_regions

WIDTH, HEADS = 32, 4


class Module(nn.Module):
    """Layers made on demand, so that a test states its graph in one function."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        self.layers = nn.ModuleDict(layers)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.call(self.layers, *args)


def linear(inside: int = WIDTH, outside: int = WIDTH) -> nn.Linear:
    return nn.Linear(inside, outside)


def regions_of(call: Callable[..., Any], *inputs: torch.Tensor, **layers: nn.Module) -> Regions:
    model = Module(call, **layers).eval()
    (captured,) = capture_graphs(model, {}, inputs_in_order=inputs)
    return find_regions(captured)


def counts(regions: Regions) -> dict[str, int]:
    return {kind: len(regions.of(kind)) for kind in KINDS if regions.of(kind)}


def reason(regions: Regions, kind: str) -> str:
    miss = regions.nearest_miss(kind)
    assert miss is not None, f"no near miss of kind {kind}"
    return miss.reason


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(m: Any, x: torch.Tensor, **settings: Any) -> torch.Tensor:
    mixed = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), **settings)
    return m.o(mixed.transpose(1, 2).flatten(2))


def feed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.gelu(m.up(x)))


def projections() -> dict[str, nn.Module]:
    return {name: linear() for name in "qkvo"} | {"up": linear(WIDTH, 64), "down": linear(64, WIDTH)}


TOKENS = torch.linspace(-1, 1, 2 * 6 * WIDTH).reshape(2, 6, WIDTH)
IDS = torch.arange(12).reshape(2, 6)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


# Attention ------------------------------------------------------------------------------------------------------------


def test_eager_attention_with_every_step() -> None:
    """Scale, softcap, mask, sinks, dropout and cast between the contractions are passed."""

    def call(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        scores = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) / 8 / 30) * 30 + mask
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        weights = F.dropout(scores.softmax(-1, dtype=torch.float32)[..., :-1], training=False).to(x.dtype)
        return x + m.o((weights @ v).transpose(1, 2).flatten(2))

    regions = regions_of(call, TOKENS, torch.zeros(2, 1, 6, 6), **projections())
    (region,) = regions.of("attention")
    assert region.variant == {
        "form": "eager",
        "mask": "tensor",
        "softcap": "yes",
        "projection": "separate",
        "cross": "self",
        "heads": "mha",
        "rope": "no",
        "qk_norm": "no",
        "cache": "no",
    }
    assert {
        "query_proj",
        "key_proj",
        "value_proj",
        "query_source",
        "key_source",
        "value_source",
        "scores",
        "softmax",
        "mask",
        "output_proj",
    } <= region.roles.keys()
    assert region.roles["mask"].op == "placeholder"
    assert (region.shapes["H"], region.shapes["Dh"]) == (HEADS, WIDTH // HEADS)


def test_cross_attention_with_fused_keys_and_values() -> None:
    def call(m: Any, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        k, v = m.kv(memory).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(heads(m.q(x)), heads(k), heads(v))
        return x + m.o(mixed.transpose(1, 2).flatten(2))

    (region,) = regions_of(
        call, TOKENS, torch.ones(2, 9, WIDTH), q=linear(), kv=linear(WIDTH, 2 * WIDTH), o=linear()
    ).of("attention")
    assert (region.variant["cross"], region.variant["projection"]) == ("cross", "fused_kv")
    assert region.roles["key_proj"] is region.roles["value_proj"]
    assert region.roles["query_source"] is not region.roles["key_source"]


def test_keys_from_a_cache() -> None:
    def call(m: Any, x: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor) -> Any:
        k, v = torch.cat([past_k, heads(m.k(x))], 2), torch.cat([past_v, heads(m.v(x))], 2)
        mixed = F.scaled_dot_product_attention(heads(m.q(x)), k, v)
        return x + m.o(mixed.transpose(1, 2).flatten(2)), k, v

    past = torch.ones(2, HEADS, 5, WIDTH // HEADS)
    (region,) = regions_of(call, TOKENS, past, past + 1, **projections()).of("attention")
    assert region.variant["cache"] == "yes"
    assert region.variant["cross"] == "self"
    assert region.roles["past_key"].op == region.roles["past_value"].op == "placeholder"
    assert region.roles["past_key"] is not region.roles["past_value"]


def test_keys_written_in_place_are_followed() -> None:
    """A buffer that is filled slice by slice leads to what was written."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        k = heads(m.k(x))
        buffer = torch.empty_like(k)
        buffer[..., :4] = k[..., 4:]
        buffer[..., 4:] = k[..., :4]
        mixed = F.scaled_dot_product_attention(heads(m.q(x)), buffer, heads(m.v(x)))
        return x + m.o(mixed.transpose(1, 2).flatten(2))

    (region,) = regions_of(call, TOKENS, **projections()).of("attention")
    assert region.variant["cross"] == "self"
    assert "key_proj" in region.roles


def test_softmax_with_one_contraction_is_a_near_miss() -> None:
    regions = regions_of(lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1), TOKENS, q=linear(), k=linear())
    assert counts(regions) == {}
    assert "found no contraction after the softmax" in reason(regions, "attention")
    miss = regions.nearest_miss("attention")
    assert miss is not None
    assert "test_regions.py" in miss.source


def test_pooling_by_softmax_is_a_near_miss() -> None:
    regions = regions_of(lambda m, x: m.q(x).softmax(1).transpose(1, 2) @ x, TOKENS, q=linear(WIDTH, 1))
    assert counts(regions) == {}
    assert "found no contraction before the softmax" in reason(regions, "attention")


def test_class_probabilities_are_no_near_miss() -> None:
    regions = regions_of(lambda m, x: m.q(x).softmax(-1), TOKENS, q=linear())
    assert regions.near_misses == []


def test_fused_encoder_layer_is_a_near_miss_that_says_what_to_do() -> None:
    (captured,) = capture_graphs(*encoders.torch_encoder())
    regions = find_regions(captured)
    assert counts(regions) == {}
    assert "set_fastpath_enabled(False)" in reason(regions, "attention")


# Feed-forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (F.gelu, "gelu"),
        (F.silu, "silu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.relu(x) ** 2, "relu2"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (F.mish, "mish"),
        (lambda x: torch.where(x > 0, 0.8 * x * x, torch.expm1(torch.min(x, -1e-6 + 0 * x)) - x), "expm1"),  # xIELU
    ],
)
def test_activation_names(activation: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    regions = regions_of(lambda m, x: x + m.down(activation(m.up(x))), TOKENS, **projections())
    (region,) = regions.of("feed_forward")
    assert region.variant == {"form": "mlp", "activation": name}


def test_gated_feed_forward_tells_gate_from_up() -> None:
    for order in (False, True):

        def call(m: Any, x: torch.Tensor, order: bool = order) -> torch.Tensor:
            a, b = (m.up(x), m.gate(x)) if order else (m.gate(x), m.up(x))
            gate, up = (b, a) if order else (a, b)
            return x + m.down(up * F.silu(gate))

        (region,) = regions_of(call, TOKENS, gate=linear(WIDTH, 64), up=linear(WIDTH, 64), down=linear(64)).of(
            "feed_forward"
        )
        roles = region.roles
        assert region.variant["form"] == "gated"
        assert roles["activation"].args[0] is roles["gate_proj"]
        assert roles["up_proj"] is not roles["gate_proj"]
        assert region.shapes["F"] == 64


def test_projector_is_a_near_miss() -> None:
    regions = regions_of(feed, TOKENS, up=linear(WIDTH, 64), down=linear(64, 48))
    assert counts(regions) == {}
    assert "not added" in reason(regions, "feed_forward")
    assert "a projector or a head" in reason(regions, "feed_forward")


def test_attention_projections_are_no_feed_forward() -> None:
    regions = regions_of(lambda m, x: x + attend(m, x), TOKENS, **projections())
    assert regions.of("feed_forward") == []


# Mixture of experts ---------------------------------------------------------------------------------------------------


def _experts(m: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, WIDTH)
    weights, chosen = m.router(flat).softmax(-1).topk(2)
    result = torch.zeros_like(flat)
    for number in range(3):
        share = (weights * (chosen == number)).sum(-1, keepdim=True)
        result = result + share * m[f"down{number}"](F.gelu(m[f"up{number}"](flat)))
    return result.view_as(x)


def _expert_layers() -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {"router": linear(WIDTH, 3)}
    return layers | {f"up{n}": linear(WIDTH, 64) for n in range(3)} | {f"down{n}": linear(64) for n in range(3)}


def test_dense_loop_over_experts_is_one_mixture() -> None:
    regions = regions_of(lambda m, x: x + _experts(m, x), TOKENS, **_expert_layers())
    assert counts(regions) == {"moe": 1}
    (region,) = regions.of("moe")
    assert (region.shapes["E"], region.shapes["K"], region.variant["scores"]) == (3, 2, "softmax")
    assert region.roles["input"].op == "placeholder"


def test_router_that_takes_the_largest_score_twice() -> None:
    """Without top_k: the largest, then the largest of the others (the router of PhiMoE)."""

    def experts(m: Any, x: torch.Tensor) -> torch.Tensor:
        scores = m.router(x)
        result = torch.zeros_like(x)
        for _ in range(2):
            largest, chosen = scores.max(-1, keepdim=True)
            weights = scores.masked_fill((largest - scores) / scores.abs().clamp(min=largest) > 0.02, -1e9).softmax(-1)
            for number in range(3):
                share = weights.gather(-1, chosen) * (chosen == number)
                result = result + share * m[f"down{number}"](F.gelu(m[f"up{number}"](x)))
            scores = scores.scatter(-1, chosen, -1e9)
        return result

    (region,) = regions_of(lambda m, x: x + experts(m, x), TOKENS, **_expert_layers()).of("moe")
    assert (region.shapes["E"], region.shapes["K"]) == (3, 2)


def test_largest_values_choose_nothing() -> None:
    """The maximum that a softmax subtracts, or a pooling, is no router."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        scores = m.router(x)
        return x + m.down0(F.gelu(m.up0(x))) * (scores - scores.max(-1, keepdim=True)[0]).exp().sum(-1, keepdim=True)

    assert counts(regions_of(call, TOKENS, **_expert_layers())).get("moe") is None


def test_router_without_residual_is_a_near_miss() -> None:
    regions = regions_of(_experts, TOKENS, **_expert_layers())
    assert regions.of("moe") == []
    assert "never reaches" in reason(regions, "moe")


# Stacks ---------------------------------------------------------------------------------------------------------------


def _two_layers(block: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda m, x: block(m, block(m, x)) * 1.5


@pytest.mark.parametrize(
    "block",
    [
        lambda m, x: (lambda y: y + feed(m, m.two(y)))(x + attend(m, m.one(x))),
        lambda m, x: m.two((lambda y: y + feed(m, y))(m.one(x + attend(m, x)))),
        lambda m, x: x + attend(m, m.one(x)) + feed(m, m.one(x)),
        lambda m, x: (attend(m, m.one(x)) + feed(m, m.two(x))) + x,
        lambda m, x: (lambda y: y + 0.3 * m.two(feed(m, y)))(x + 0.3 * m.one(attend(m, x))),
    ],
    ids=["pre_norm", "post_norm", "parallel", "parallel_sum_first", "norm_inside_and_scale"],
)
def test_layers_of_every_residual_form(block: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    norms = {"one": nn.LayerNorm(WIDTH), "two": nn.LayerNorm(WIDTH)}
    regions = regions_of(_two_layers(block), TOKENS, **projections(), **norms)
    assert counts(regions) == {"decoder_stack": 1, "attention": 2, "feed_forward": 2}
    (stack,) = regions.of("decoder_stack")
    first, second = stack.layers
    assert first.input is stack.roles["input"]
    assert first.input.op == "placeholder"
    assert first.output is second.input
    assert second.output is stack.roles["output"]
    assert [user.target for user in second.output.users] == [torch.ops.aten.mul.Tensor]  # the last node of the stack
    assert all(layer.attention and layer.feed_forward for layer in stack.layers)


def test_a_block_that_is_no_known_region_leaves_the_stack_whole() -> None:
    def block(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x + attend(m, m.one(x))
        return y + m.down(m.up(m.two(y)).cumsum(1))

    norms = {"one": nn.LayerNorm(WIDTH), "two": nn.LayerNorm(WIDTH)}
    regions = regions_of(_two_layers(block), TOKENS, **projections(), **norms)
    assert counts(regions) == {"decoder_stack": 1, "attention": 2}
    (stack,) = regions.of("decoder_stack")
    attentions = [layer.attention for layer in stack.layers if layer.attention]
    assert attentions == regions.of("attention")


def test_attention_without_residual_is_no_stack() -> None:
    regions = regions_of(lambda m, x: attend(m, x), TOKENS, **projections())
    assert counts(regions) == {"attention": 1}


@pytest.mark.parametrize(("settings", "causal"), [({}, "no"), ({"is_causal": True}, "yes")])
def test_causal_flag(settings: dict[str, Any], causal: str) -> None:
    regions = regions_of(lambda m, x: x + attend(m, x, **settings), TOKENS, **projections())
    assert regions.of("decoder_stack")[0].variant["causal"] == causal


def test_causal_by_comparing_positions() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        return x + attend(m, x, attn_mask=places[:, None] >= places[None, :])

    assert regions_of(call, TOKENS, **projections()).of("decoder_stack")[0].variant["causal"] == "yes"


def test_local_window_is_not_causal() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        return x + attend(m, x, attn_mask=(places[:, None] - places[None, :]).abs() <= 2)

    assert regions_of(call, TOKENS, **projections()).of("decoder_stack")[0].variant["causal"] == "no"


# Vision encoders and merge points -------------------------------------------------------------------------------------


def patches(m: Any, images: torch.Tensor) -> torch.Tensor:
    return m.patch(images).flatten(2).transpose(1, 2)


def encode(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + attend(m, x)
    return x + feed(m, x)


def test_patches_by_views_and_a_linear() -> None:
    def call(m: Any, images: torch.Tensor) -> torch.Tensor:
        rows = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return encode(m, m.patch(rows))

    regions = regions_of(call, IMAGES, patch=linear(48), **projections())
    (region,) = regions.of("vision_encoder")
    assert region.variant["patches"] == "linear"
    assert region.roles["patch_embedding"] is region.roles["tokens"]
    assert region.shapes["prefix"] == 0


def test_tokens_behind_the_patches_are_no_prefix() -> None:
    def call(m: Any, images: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return encode(m, torch.cat([extra[:, :2], patches(m, images), extra], dim=1))

    regions = regions_of(call, IMAGES, TOKENS, patch=nn.Conv2d(3, WIDTH, 4, 4), **projections())
    (region,) = regions.of("vision_encoder")
    assert region.shapes["prefix"] == 2
    assert region.roles["class_token"] is region.roles["tokens"]


def test_patches_without_attention_are_a_near_miss() -> None:
    regions = regions_of(lambda m, x: patches(m, x).mean(1), IMAGES, patch=nn.Conv2d(3, WIDTH, 4, 4))
    assert counts(regions) == {}
    assert "reaches none" in reason(regions, "vision_encoder")


def test_convolutional_backbone_is_a_near_miss() -> None:
    def call(m: Any, images: torch.Tensor) -> torch.Tensor:
        return encode(m, m.mix(F.relu(m.patch(images))).flatten(2).transpose(1, 2))

    regions = regions_of(call, IMAGES, patch=nn.Conv2d(3, 8, 4, 4), mix=nn.Conv2d(8, WIDTH, 1), **projections())
    assert counts(regions) == {"decoder_stack": 1, "attention": 1, "feed_forward": 1}
    assert "convolutional backbone" in reason(regions, "vision_encoder")


def test_convolutions_over_embeddings_or_in_causal_order_make_no_audio_encoder() -> None:
    def text(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return encode(m, m.mix(m.table(ids).transpose(1, 2)).transpose(1, 2))

    def causal(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + attend(m, x, is_causal=True)
        return x + feed(m, x)

    def point(m: Any, x: torch.Tensor) -> torch.Tensor:
        return encode(m, m.mix(x.transpose(1, 2)).transpose(1, 2))

    mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    for call, given, conv in ((text, IDS, mix), (causal, TOKENS, mix), (point, TOKENS, nn.Conv1d(WIDTH, WIDTH, 1))):
        regions = regions_of(call, given, mix=conv, table=nn.Embedding(50, WIDTH), **projections())
        assert counts(regions) == {"decoder_stack": 1, "attention": 1, "feed_forward": 1}
        assert (call is causal) == ("audio_encoder" in {miss.kind for miss in regions.near_misses})
    (region,) = regions_of(point, TOKENS, mix=mix, **projections()).of("audio_encoder")
    assert region.variant == {"convolutions": "1"}


def _merge(form: str) -> Callable[..., torch.Tensor]:
    def call(m: Any, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x, image = m.table(ids), ids == 3
        if form == "masked_scatter":
            x = x.masked_scatter(image[..., None], features)
        elif form == "where":
            x = torch.where(image[..., None], features[:, :1], x)
        elif form == "cat":
            x = torch.cat([features, x], dim=1)
        elif form == "index_put":
            x = x.index_put((image,), features[0, :1])
        elif form == "copy":
            x = x.clone()
            x[:, 1:3] = features[:, :2]
        return encode(m, x)

    return call


@pytest.mark.parametrize("form", ["masked_scatter", "where", "cat", "index_put", "copy"])
def test_merge_points_of_every_form(form: str) -> None:
    regions = regions_of(_merge(form), IDS, TOKENS, table=nn.Embedding(20, WIDTH), **projections())
    (merge,) = regions.of("merge_point")
    (stack,) = regions.of("decoder_stack")
    assert merge.variant == {"form": form, "features": "input"}
    assert stack.roles["input"] is merge.roles["output"]
    assert ("write" in merge.roles) == (form == "copy")
    assert ("mask" in merge.roles) == (form in ("masked_scatter", "where", "index_put"))


def test_scatter_outside_the_stream_is_a_near_miss() -> None:
    def call(m: Any, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = encode(m, m.table(ids))
        return x.masked_scatter((ids == 3)[..., None], features)

    regions = regions_of(call, IDS, TOKENS, table=nn.Embedding(20, WIDTH), **projections())
    assert regions.of("merge_point") == []
    assert "not the residual stream" in reason(regions, "merge_point")


def test_position_embeddings_are_no_merge() -> None:
    def call(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return encode(m, m.table(ids) + m.places(torch.arange(ids.shape[1])))

    regions = regions_of(call, IDS, table=nn.Embedding(20, WIDTH), places=nn.Embedding(20, WIDTH), **projections())
    assert regions.of("merge_point") == []


# Labels and time ------------------------------------------------------------------------------------------------------


def test_names_of_modules_do_not_matter() -> None:
    """The same graph without any module information has the same regions."""
    (captured,) = capture_graphs(*vision.fused_vit())
    named = find_regions(captured)
    for node in captured.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("stack_trace", None)
    bare = find_regions(captured.graph)
    assert counts(bare) == counts(named)
    assert [r.roles for r in bare.regions] == [r.roles for r in named.regions]
    assert {r.path for r in bare.regions} == {""}
    assert named.of("attention")[1].path == "blocks.1"
    assert "zoo/vision.py" in named.of("attention")[1].source


def test_detection_adds_no_guard() -> None:
    (captured,) = capture_graphs(*decoders.qwen2())
    env = captured.fake_mode.shape_env
    assert env is not None
    before = len(env.guards)
    find_regions(captured)
    assert len(env.guards) == before


@pytest.mark.slow
def test_thirty_two_layers_within_a_second() -> None:
    (captured,) = capture_graphs(*decoders.llama(layers=32))
    start = time.process_time()
    regions = find_regions(captured)
    spent = time.process_time() - start
    assert counts(regions) == {"decoder_stack": 1, "attention": 32, "feed_forward": 32}
    assert len(regions.of("decoder_stack")[0].layers) == 32
    assert spent < 1.0
