"""Exact region counts of every family in the zoo: a region that is lost or invented fails here.

Each row is (family, counts in the order of ``KINDS``, what attention and feed-forward regions must say).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tests.members import members
from tests.zoo import Family, audio, capture_graphs, decoders, encoders, seq2seq, vision
from tests.zoo.vlm import VLMS, shallow
from tokcompile.regions import KINDS, Region, Regions, find_regions
from tokcompile.regions.flow import Flow


@dataclass
class Row:
    """One family: counts (vision encoder, audio encoder, merge point, decoder stack, attention, feed-forward, MoE) and
    variants."""

    family: Family
    counts: tuple[int, ...]
    attention: dict[str, str] = field(default_factory=dict)
    feed_forward: dict[str, str] = field(default_factory=dict)
    causal: str | None = None
    shapes: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    dynamic: bool = True


DECODER = (0, 0, 0, 1, 2, 2, 0)
MIXTURE = (0, 0, 0, 1, 2, 0, 2)
VISION = (1, 0, 0, 0, 2, 2, 0)
SEQ2SEQ = (0, 0, 0, 2, 6, 4, 0)
AUDIO = (0, 1, 0, 0, 2, 2, 0)
HEARS = (0, 1, 0, 1, 6, 4, 0)

GQA = {"heads": "gqa", "rope": "yes", "projection": "separate", "cross": "self", "form": "sdpa", "cache": "no"}
MHA = {"heads": "mha", "rope": "no", "cross": "self", "cache": "no"}
SWIGLU = {"form": "gated", "activation": "silu"}
HEADS = {"H": 4, "Hkv": 2, "Dh": 16}

d, e, v, s, a = decoders, encoders, vision, seq2seq, audio
TABLE = [
    Row(d.llama, DECODER, GQA | {"qk_norm": "no", "softcap": "no"}, SWIGLU, "yes", HEADS),
    Row(d.mistral, DECODER, GQA, SWIGLU, "yes", HEADS),
    Row(d.qwen2, DECODER, GQA, SWIGLU, "yes", HEADS),
    Row(d.qwen3, DECODER, GQA | {"qk_norm": "yes"}, SWIGLU, "yes", HEADS),
    Row(
        d.gemma,
        DECODER,
        {"heads": "mqa", "rope": "yes"},
        {"form": "gated", "activation": "gelu_tanh"},
        "yes",
        {"Hkv": 1},
    ),
    Row(
        d.gemma2,
        DECODER,
        {"form": "eager", "softcap": "yes", "heads": "gqa", "mask": "tensor", "rope": "yes"},
        {"form": "gated", "activation": "gelu_tanh"},
        "yes",
        HEADS,
    ),
    Row(d.gemma3_text, DECODER, GQA | {"qk_norm": "yes"}, {"activation": "gelu_tanh"}, "yes", HEADS),
    Row(d.phi, DECODER, {"heads": "mha", "rope": "yes"}, {"form": "mlp", "activation": "gelu_tanh"}, "yes"),
    Row(
        d.phi3,
        DECODER,
        {"heads": "gqa", "rope": "yes", "projection": "fused_qkv"},
        {"form": "fused_gate_up", "activation": "silu"},
        "yes",
        HEADS,
    ),
    Row(d.gpt2, DECODER, MHA | {"projection": "fused_qkv"}, {"form": "mlp", "activation": "gelu_tanh"}, "yes"),
    Row(d.gpt_neox, DECODER, {"heads": "mha", "rope": "yes", "projection": "fused_qkv"}, {"form": "mlp"}, "yes"),
    Row(d.gptj, DECODER, {"heads": "mha", "rope": "yes"}, {"form": "mlp"}, "yes"),
    Row(d.opt, DECODER, MHA, {"form": "mlp", "activation": "relu"}, "yes"),
    Row(
        d.bloom,
        DECODER,
        MHA | {"form": "eager", "projection": "fused_qkv", "mask": "tensor"},
        {"form": "mlp"},
        "yes",
        {"H": 4, "Dh": 16},
    ),
    Row(d.falcon, DECODER, {"heads": "mqa", "rope": "yes", "projection": "fused_qkv"}, {"form": "mlp"}, "yes"),
    Row(d.stablelm, DECODER, GQA, SWIGLU, "yes", HEADS),
    Row(d.olmo2, DECODER, GQA | {"qk_norm": "yes"}, SWIGLU, "yes", HEADS),
    Row(d.granite, DECODER, GQA, SWIGLU, "yes", HEADS),
    Row(d.cohere, DECODER, GQA, SWIGLU, "yes", HEADS),
    Row(d.smollm3, DECODER, GQA, SWIGLU, "yes", HEADS),
    Row(d.glm4, DECODER, {"heads": "gqa", "rope": "yes"}, {"form": "fused_gate_up"}, "yes", HEADS),
    Row(d.starcoder2, DECODER, GQA, {"form": "mlp"}, "yes", HEADS),
    Row(d.nemotron, DECODER, GQA, {"form": "mlp", "activation": "relu2"}, "yes", HEADS),
    Row(d.mixtral, MIXTURE, GQA, {}, "yes", HEADS),
    Row(d.qwen3_moe, MIXTURE, GQA | {"qk_norm": "yes"}, {}, "yes", HEADS),
    Row(d.qwen2_moe, MIXTURE, GQA, {}, "yes", HEADS),  # the shared expert belongs to the mixture
    Row(d.olmoe, MIXTURE, GQA | {"qk_norm": "yes"}, {}, "yes", HEADS),
    Row(d.deepseek_v3, (0, 0, 0, 1, 2, 1, 1), {"heads": "mha", "rope": "yes", "cross": "self"}, SWIGLU, "yes"),
    Row(d.gpt_oss, MIXTURE, GQA | {"form": "eager", "mask": "tensor"}, {}, "yes", HEADS),
    Row(e.bert, DECODER, MHA | {"projection": "separate"}, {"form": "mlp", "activation": "gelu"}, "no"),
    Row(e.bert_classifier, DECODER, MHA, {"form": "mlp"}, "no"),
    Row(e.roberta, DECODER, MHA, {"form": "mlp"}, "no"),
    Row(e.distilbert, DECODER, MHA, {"form": "mlp"}, "no"),
    Row(e.modernbert, DECODER, {"rope": "yes", "projection": "fused_qkv"}, {"form": "fused_gate_up"}, "no"),
    Row(e.clip_text, DECODER, MHA, {"form": "mlp", "activation": "quick_gelu"}, "yes"),
    Row(
        e.torch_encoder,
        DECODER,
        MHA | {"projection": "fused_qkv"},
        {"form": "mlp", "activation": "relu"},
        "no",
        {"H": 4, "Dh": 16},
    ),
    Row(e.torch_encoder_pre_norm, DECODER, MHA | {"projection": "fused_qkv"}, {"form": "mlp"}, "no"),
    Row(
        e.hand_written,
        DECODER,
        MHA | {"form": "eager", "projection": "fused_qkv"},
        {"form": "mlp", "activation": "relu2"},
        "no",
        {"H": 4, "Dh": 16},
    ),
    Row(v.vit, VISION, MHA, {"form": "mlp"}, encoder={"N": 17, "P": 16, "prefix": 1, "D": 64}),
    Row(v.deit, VISION, MHA, {"form": "mlp"}, encoder={"N": 18, "P": 16, "prefix": 2}),
    Row(v.dinov2, VISION, MHA, {"form": "mlp"}, encoder={"prefix": 1}),
    Row(v.dinov2_swiglu, VISION, MHA, SWIGLU, encoder={"prefix": 1}),
    Row(v.dinov2_registers, VISION, MHA, {"form": "mlp"}, encoder={"prefix": 4}),
    Row(v.dinov3, VISION, {"heads": "mha", "rope": "yes"}, {"form": "mlp"}, encoder={"prefix": 4}),
    Row(
        v.clip_vision, VISION, MHA, {"form": "mlp", "activation": "quick_gelu"}, encoder={"N": 17, "P": 16, "prefix": 1}
    ),
    # one more attention and feed-forward: the pooling head, which is outside the encoder's stream
    Row(v.siglip, (1, 0, 0, 0, 3, 3, 0), {"heads": "mha"}, {"form": "mlp"}, encoder={"prefix": 0}),
    Row(v.beit, VISION, MHA | {"mask": "tensor"}, {"form": "mlp"}, encoder={"prefix": 1}),
    Row(
        v.swin, (1, 0, 0, 0, 4, 4, 0), MHA, {"form": "mlp"}, encoder={"N": 64, "prefix": 0, "layers": 4}, dynamic=False
    ),
    Row(
        v.hiera,
        (1, 0, 0, 0, 3, 3, 0),
        {"projection": "fused_qkv"},
        {"form": "mlp"},
        encoder={"layers": 3},
        dynamic=False,
    ),
    Row(v.videomae, VISION, MHA, {"form": "mlp"}, encoder={"prefix": 0}),
    Row(v.segformer, VISION, MHA, {"form": "mlp", "convolution": "yes"}, encoder={"prefix": 0}, dynamic=False),
    Row(v.fused_vit, VISION, MHA | {"projection": "fused_qkv"}, {"form": "mlp"}, encoder={"prefix": 1}),
    Row(s.t5, SEQ2SEQ, {"heads": "mha", "rope": "no"}, {"form": "mlp", "activation": "relu"}),
    Row(s.t5_gated, SEQ2SEQ, {"heads": "mha"}, {"form": "gated", "activation": "gelu_tanh"}),
    Row(s.bart, SEQ2SEQ, {"heads": "mha"}, {"form": "mlp"}),
    Row(s.marian, SEQ2SEQ, {"heads": "mha"}, {"form": "mlp"}),
    Row(s.whisper, HEARS, {"heads": "mha"}, {"form": "mlp"}, encoder={"N": 16, "D": 64, "prefix": 0}),
    Row(a.speech_to_text, HEARS, {"heads": "mha"}, {"form": "mlp"}, encoder={"D": 32, "prefix": 0}),
    Row(a.wav2vec2, AUDIO, MHA, {"form": "mlp"}, encoder={"D": 32, "prefix": 0}),
    Row(a.hubert_large, AUDIO, MHA, {"form": "mlp"}, encoder={"D": 32, "prefix": 0}),
    Row(a.hand_written, AUDIO, MHA, {"form": "mlp"}, encoder={"D": 32, "prefix": 1}),
]


#: What another row has too: the same norms, projections, activations and order of layers.
LIKE_OTHERS = [
    *(d.mistral, d.qwen2, d.gemma3_text, d.stablelm, d.olmo2, d.granite, d.cohere, d.smollm3, d.glm4, d.starcoder2),
    *(d.qwen3_moe, d.olmoe, e.bert_classifier, e.roberta, e.distilbert, v.deit, v.dinov2, v.videomae, v.fused_vit),
    *(d.gptj, d.falcon, e.clip_text, s.t5_gated, s.marian, a.speech_to_text, a.hubert_large),
]
#: Of these the self- and cross-attention of each stack is looked at too: whether the encoder is a decoder stack.
ROLES = {s.t5: ["no", "yes"], s.bart: ["no", "yes"], s.whisper: ["yes"]}


def counts(regions: Regions) -> tuple[int, ...]:
    return tuple(len(regions.of(kind)) for kind in KINDS)


@pytest.mark.parametrize(
    "row", members(TABLE, [row for row in TABLE if row.family not in LIKE_OTHERS]), ids=lambda row: row.family.__name__
)
def test_family(row: Row) -> None:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder would be one opaque operation per layer
    try:
        (captured,) = capture_graphs(*row.family(), dynamic=row.dynamic)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    regions = find_regions(captured)
    assert counts(regions) == row.counts
    for region in regions.of("attention"):
        check(region, row.attention, row.shapes)
        assert {"query", "key", "value", "output", "query_source", "output_proj"} <= region.roles.keys()
    for region in regions.of("feed_forward"):
        check(region, row.feed_forward, {})
    for region in regions.of("moe"):
        assert {"input", "router", "top_k", "output"} <= region.roles.keys()
        assert (region.shapes["E"], region.shapes["K"]) == (4, 2)
    for region in regions.of("decoder_stack"):
        assert row.causal is None or region.variant["causal"] == row.causal
        check_layers(captured.graph, region, 2)
    for region in (*regions.of("vision_encoder"), *regions.of("audio_encoder")):
        check(region, {}, {k: n for k, n in row.encoder.items() if k != "layers"})
        assert ("class_token" in region.roles) == (region.shapes["prefix"] != 0)
        check_layers(captured.graph, region, row.encoder.get("layers", 2))
    if row.family in ROLES:
        check_roles(regions, ROLES[row.family])


def check(region: Region, variant: dict[str, str], shapes: dict[str, Any]) -> None:
    assert {k: region.variant.get(k) for k in variant} == variant
    assert {k: region.shapes.get(k) for k in shapes} == shapes


def check_layers(graph: torch.fx.Graph, region: Region, count: int) -> None:
    """Layers are linked, complete, and each output is on every path to the last one."""
    assert [layer.index for layer in region.layers] == list(range(count))
    assert all(layer.attention and layer.feed_forward for layer in region.layers)
    paths = {layer.path for layer in region.layers}
    assert len(paths) == count
    flow = Flow(graph)
    first, last = region.layers[0].input, region.layers[-1].output
    assert region.roles["output"] is last
    for layer in region.layers:
        if layer.output is not last:
            assert not connects(flow, first, last, layer.output), f"{layer.output} is no cut"
        assert flow.reaches(layer.input, layer.output)


def connects(flow: Flow, start: torch.fx.Node, end: torch.fx.Node, without: torch.fx.Node) -> bool:
    """Whether a path from ``start`` to ``end`` avoids ``without``."""
    seen, stack = {start}, [start]
    while stack:
        for user in flow.users[stack.pop()]:
            if user is end:
                return True
            if user is not without and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def check_roles(regions: Regions, causal: list[str]) -> None:
    """Of a model with an encoder and a decoder: which stacks are causal, and which attention reads the encoder."""
    *encoders, decoder = regions.of("decoder_stack")
    assert [stack.variant["causal"] for stack in (*encoders, decoder)] == causal
    assert [r.variant["cross"] for r in regions.of("attention")] == ["self"] * 2 + ["self", "cross"] * 2
    assert all(layer.attention is not None and layer.attention.variant["cross"] == "self" for layer in decoder.layers)


#: Encode first, as ``generate()`` does: counts of the prefill graph, then of the decode graph.
STEPS = [(0, 0, 1, 1, 2, 2, 0), (0, 0, 0, 1, 2, 2, 0)]
GENERATED = {"llava": STEPS, "qwen3_vl": STEPS}
#: All in one graph. LLaVA takes the features of the last but one layer and, from transformers 5.24 on, returns the last
#: layer's output too, so that this layer stays in the graph.
LLAVA = (1, 0, 1, 1, 4, 4, 0) if Version(transformers.__version__) < Version("5.24") else (1, 0, 1, 1, 5, 5, 0)
DIRECT = {"llava": LLAVA, "plain_cat": (1, 0, 1, 1, 4, 4, 0), "plain_index_put": (1, 0, 1, 1, 4, 4, 0)}


@pytest.mark.parametrize("name", GENERATED)
def test_vlm_through_generate(name: str) -> None:
    case = shallow(VLMS[name]())
    inputs: dict[str, Any] = case.inputs(batch=2, left_padding=2) | {"max_new_tokens": 3, "do_sample": False}
    found = [find_regions(captured) for captured in capture_graphs(case.model, inputs, "generate")]
    assert [counts(regions) for regions in found] == GENERATED[name]
    (merge,) = found[0].of("merge_point")
    assert merge.variant == {"form": "masked_scatter", "features": "input", "modality": "image"}
    assert {"output", "embeddings", "features", "mask"} <= merge.roles.keys()
    (stack,) = found[0].of("decoder_stack")
    assert stack.roles["input"] is merge.roles["output"]
    assert len(stack.layers) == 2
    assert {r.variant["cache"] for r in found[0].of("attention")} == {"no"}
    assert {r.variant["cache"] for r in found[1].of("attention")} == {"yes"}
    assert all({"past_key", "past_value"} <= r.roles.keys() for r in found[1].of("attention"))
    if name == "qwen3_vl":  # deepstack features enter between the layers, which is no merge point
        assert "between its layers" in found[0].nearest_miss("merge_point").reason  # type: ignore[union-attr]


@pytest.mark.parametrize("name", DIRECT)
def test_vlm_in_one_graph(name: str) -> None:
    case = shallow(VLMS[name]())
    (captured,) = capture_graphs(case.model, case.inputs(batch=2))
    regions = find_regions(captured)
    assert counts(regions) == DIRECT[name]
    (merge,) = regions.of("merge_point")
    assert merge.variant["features"] == "encoder"
    (stack,) = regions.of("decoder_stack")
    assert stack.roles["input"] is merge.roles["output"]
