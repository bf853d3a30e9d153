"""What region detection returns: one small class for each kind of region, with a field for each thing it knows.

::

    Region -- AttentionRegion
           -- FeedForwardRegion, MoeRegion
           -- MergePoint
           -- StackRegion -- EncoderRegion -- VisionEncoder
                          |                -- AudioEncoder
                          -- DecoderStack

Fields are graph nodes, sizes (ints or SymInts) and facts (booleans, or a word where there are more than two ways). What
a region does not have is None.

One file: the kinds are read side by side, and a stack names what its layers hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, overload

import torch
from torch import fx

from tokcompile.kinds import STACKS

#: Of a dimension: a number, or symbolic.
Size: TypeAlias = int | torch.SymInt


@dataclass(eq=False, kw_only=True)
class Region:
    """A part of the graph with a known dataflow role. Regions are compared, and hashed, by identity.

    Attributes:
        kind: one of :data:`~tokcompile.kinds.KINDS`.
        path: module path of the code that made it ("" when the graph has no module information).
        source: ``file:line``.
        output: the node that holds its result.
    """

    kind: ClassVar[str]
    ROLES: ClassVar[tuple[str, ...]] = ("output",)  # fields that hold a node, in the order of reports
    SIZES: ClassVar[Mapping[str, str]] = {}  # letter in reports -> field

    path: str = ""
    source: str = ""
    output: fx.Node

    @property
    def roles(self) -> Mapping[str, fx.Node]:
        """Role name -> node, of the roles that are filled: a view of the fields of the same names."""
        found = {role: getattr(self, role) for role in self.ROLES}
        return MappingProxyType({role: node for role, node in found.items() if node is not None})

    @property
    def shapes(self) -> Mapping[str, Size]:
        """Letter (B, S, H, Hkv, Dh, D, F, N ...) -> size: a view of the fields."""
        found = {letter: getattr(self, name) for letter, name in self.SIZES.items()}
        return MappingProxyType({letter: size for letter, size in found.items() if size is not None})

    @property
    def variant(self) -> Mapping[str, str]:
        """Which alternative was taken, in the words of reports (``{"form": "sdpa", ...}``): a view of the fields."""
        return MappingProxyType(self._variant())

    def _variant(self) -> dict[str, str]:
        return {}

    def as_dict(self) -> dict[str, Any]:
        """kind, path, roles (role -> node name), shapes, variant and source; sizes may be symbolic."""
        return {
            "kind": self.kind,
            "path": self.path,
            "roles": {role: node.name for role, node in self.roles.items()},
            "shapes": dict(self.shapes),
            "variant": dict(self.variant),
            "source": self.source,
        }


@dataclass(eq=False, kw_only=True)
class AttentionRegion(Region):
    """Attention; see :mod:`tokcompile.regions.attention`.

    Attributes:
        query, key, value: what enters the contractions, after norms, RoPE and the cache.
        scores, softmax: the first contraction and the softmax; None where it is one node.
        mask: what is added to the scores, or hides some.
        query_proj ... output_proj: the linear maps in front of and behind it, where there are any.
        query_source ... value_source: what these projections read.
        past_key, past_value: graph inputs that hold the keys and values so far.
        batch, queries, keys, heads, kv_heads, head_dim: sizes.
        form: "eager": two contractions and a softmax; "sdpa": one ``scaled_dot_product_attention`` node; "packed": one
            node for several sequences in one row, each of which sees itself alone.
        causal_flag: the ``is_causal`` of the form "sdpa".
        causal: a token sees only what came before it, by the flag, the mask or a cache.
        cross: keys and queries come from different sequences.
        cached: keys come, in front of the new ones or all of them, from an input of the graph.
        rope, qk_norm: queries are rotated; queries or keys are normalised.
        softcap: the scores go through a tanh.
        projection: "fused_qkv" and "fused_kv": one linear makes several of them.
        grouping: "mha": as many key heads as query heads; "mqa": one; "gqa": fewer.
    """

    kind = "attention"
    ROLES = (
        *("query", "key", "value", "scores", "softmax", "output", "mask"),
        *("query_proj", "query_source", "key_proj", "key_source", "value_proj", "value_source", "output_proj"),
        *("past_key", "past_value"),
    )
    SIZES: ClassVar[Mapping[str, str]] = {
        "S": "queries",
        "Dh": "head_dim",
        "T": "keys",
        "B": "batch",
        "H": "heads",
        "Hkv": "kv_heads",
    }

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scores: fx.Node | None = None
    softmax: fx.Node | None = None
    mask: fx.Node | None = None
    query_proj: fx.Node | None = None
    key_proj: fx.Node | None = None
    value_proj: fx.Node | None = None
    output_proj: fx.Node | None = None
    query_source: fx.Node | None = None
    key_source: fx.Node | None = None
    value_source: fx.Node | None = None
    past_key: fx.Node | None = None
    past_value: fx.Node | None = None
    batch: Size = 1
    queries: Size = 1
    keys: Size = 1
    heads: Size = 1
    kv_heads: Size = 1
    head_dim: Size = 1
    form: Literal["eager", "sdpa", "packed"]
    causal_flag: bool = False
    causal: bool = False
    cross: bool = False
    cached: bool = False
    rope: bool = False
    qk_norm: bool = False
    softcap: bool = False
    projection: Literal["separate", "fused_kv", "fused_qkv"] = "separate"
    grouping: Literal["mha", "gqa", "mqa"] = "mha"

    def _variant(self) -> dict[str, str]:
        return {
            "form": self.form,
            "mask": self._mask(),
            "softcap": _yes(self.softcap),
            "projection": self.projection,
            "cross": "cross" if self.cross else "self",
            "heads": self.grouping,
            "rope": _yes(self.rope),
            "qk_norm": _yes(self.qk_norm),
            "cache": _yes(self.cached),
        }

    def _mask(self) -> str:
        if self.form == "packed":
            return "blocks"
        return "causal" if self.causal_flag else "none" if self.mask is None else "tensor"


@dataclass(eq=False, kw_only=True)
class FeedForwardRegion(Region):
    """A feed-forward block; see :mod:`tokcompile.regions.feed_forward`.

    Attributes:
        input: what the projections read.
        gate_proj, up_proj, down_proj: linear maps; no gate in the form "mlp".
        activation: the last node that depends on the gate only (or on the one projection).
        form: "mlp": one projection; "gated": two; "fused_gate_up": one linear that makes both.
        activation_name: "gelu", "silu", "relu2" and so on.
        convolution: neighbouring tokens are mixed between the projections.
        batch, tokens: B and S of an input [B, S, D]; of another form: None.
        width, inner_width: D, and that between the projections.
    """

    kind = "feed_forward"
    ROLES = ("input", "gate_proj", "up_proj", "activation", "down_proj", "output")
    SIZES: ClassVar[Mapping[str, str]] = {"B": "batch", "S": "tokens", "D": "width", "F": "inner_width"}

    input: fx.Node
    gate_proj: fx.Node | None = None
    up_proj: fx.Node
    activation: fx.Node
    down_proj: fx.Node
    batch: Size | None = None
    tokens: Size | None = None
    width: Size
    inner_width: Size
    form: Literal["mlp", "gated", "fused_gate_up"]
    activation_name: str
    convolution: bool = False

    def _variant(self) -> dict[str, str]:
        more = {"convolution": "yes"} if self.convolution else {}
        return {"form": self.form, "activation": self.activation_name, **more}


@dataclass(eq=False, kw_only=True)
class MoeRegion(Region):
    """A mixture of experts; see :mod:`tokcompile.regions.moe`.

    Attributes:
        input: what the router reads.
        router: its linear.
        top_k: the choice.
        batch, tokens: B and S of an input [B, S, D]; of another form: None.
        width: D.
        experts: their number.
        experts_per_token: how many are chosen.
        form: how the experts are computed: "loop", "batched", "grouped", or "other".
        score_function: "softmax", "sigmoid" or "linear", behind the router.
        shared_expert: some of it serves every token.
    """

    kind = "moe"
    ROLES = ("input", "router", "top_k", "output")
    SIZES: ClassVar[Mapping[str, str]] = {
        "D": "width",
        "E": "experts",
        "B": "batch",
        "S": "tokens",
        "K": "experts_per_token",
    }

    input: fx.Node
    router: fx.Node
    top_k: fx.Node
    batch: Size | None = None
    tokens: Size | None = None
    width: Size
    experts: Size
    experts_per_token: Size
    form: Literal["loop", "batched", "grouped", "other"]
    score_function: Literal["softmax", "sigmoid", "linear"]
    shared_expert: bool

    def _variant(self) -> dict[str, str]:
        return {"form": self.form, "scores": self.score_function, "shared_expert": _yes(self.shared_expert)}


@dataclass(eq=False, kw_only=True)
class MergePoint(Region):
    """Where image features enter the sequence of text embeddings; see :mod:`tokcompile.regions.merge`.

    Attributes:
        embeddings, features: the two sides.
        mask: the positions that features fill, where the graph has them.
        write: of the form "copy": the node after which ``output`` holds the features.
        batch, tokens: B and S of an output [B, S, D]; of another form: None.
        width: D.
        form: the operation: "masked_scatter", "cat" and so on.
        encoded: the features come from an encoder of the same graph, else from an input of it.
        modality: "image" or "video"; None where the arguments of the model do not say.
    """

    kind = "merge_point"
    ROLES = ("output", "embeddings", "features", "mask", "write")
    SIZES: ClassVar[Mapping[str, str]] = {"B": "batch", "S": "tokens", "D": "width"}

    embeddings: fx.Node
    features: fx.Node
    mask: fx.Node | None = None
    write: fx.Node | None = None
    batch: Size | None = None
    tokens: Size | None = None
    width: Size
    form: str
    encoded: bool
    modality: Literal["image", "video"] | None = None

    def _variant(self) -> dict[str, str]:
        more = {"modality": self.modality} if self.modality else {}
        return {"form": self.form, "features": "encoder" if self.encoded else "input", **more}


@dataclass(eq=False, kw_only=True)
class StackRegion(Region):
    """Layers along one residual stream; ``output`` is what leaves the last one.

    Attributes:
        layers: in order.
        batch, width: B and D of the residual stream [B, S, D]; B is 1 where it has no batch.
    """

    layers: list[Layer] = field(default_factory=list)
    batch: Size
    width: Size


@dataclass(eq=False, kw_only=True)
class EncoderRegion(StackRegion):
    """A stack whose tokens are made from a signal.

    Attributes:
        tokens: the residual stream in front of the first layer.
        class_token: the (last) ``cat`` that puts tokens in front of those of the signal; None: there are none.
        token_count: all of them, N.
        prefix, suffix: how many of these are in front of those of the signal, and behind.
    """

    tokens: fx.Node
    class_token: fx.Node | None = None
    token_count: Size
    prefix: Size = 0
    suffix: Size = 0

    @property
    def shapes(self) -> Mapping[str, Size]:
        """As of any region; ``suffix`` is there where tokens are behind those of the signal."""
        found = dict(super().shapes)
        if isinstance(self.suffix, int) and self.suffix == 0:
            del found["suffix"]
        return MappingProxyType(found)


@dataclass(eq=False, kw_only=True)
class VisionEncoder(EncoderRegion):
    """See :mod:`tokcompile.regions.vision`.

    Attributes:
        patch_embedding: the node that turns pixels into one vector for each patch.
        patches: how: "conv", "overlapping_conv" or "linear".
        patch_count: their number, P.
        stages: stacks of layers, with patches merged between them.
        grid: tokens lie in two axes, [B, rows, columns, D].
    """

    kind = "vision_encoder"
    ROLES = ("patch_embedding", "tokens", "output", "class_token")
    SIZES: ClassVar[Mapping[str, str]] = {
        "B": "batch",
        "D": "width",
        "P": "patch_count",
        "N": "token_count",
        "prefix": "prefix",
        "suffix": "suffix",
    }

    patch_embedding: fx.Node
    patches: Literal["conv", "overlapping_conv", "linear"]
    patch_count: Size
    stages: int = 1
    grid: bool = False

    def _variant(self) -> dict[str, str]:
        return {"patches": self.patches, "stages": str(self.stages), "tokens": "grid" if self.grid else "sequence"}


@dataclass(eq=False, kw_only=True)
class AudioEncoder(EncoderRegion):
    """See :mod:`tokcompile.regions.audio`.

    Attributes:
        convolution: the last one along time.
        convolutions: how many there are.
    """

    kind = "audio_encoder"
    ROLES = ("convolution", "tokens", "output", "class_token")
    SIZES: ClassVar[Mapping[str, str]] = {
        "B": "batch",
        "D": "width",
        "N": "token_count",
        "prefix": "prefix",
        "suffix": "suffix",
    }

    convolution: fx.Node
    convolutions: int

    def _variant(self) -> dict[str, str]:
        return {"convolutions": str(self.convolutions)}


@dataclass(eq=False, kw_only=True)
class DecoderStack(StackRegion):
    """A stack that is no encoder of a signal, text encoders among them.

    Attributes:
        input: the residual stream in front of the first layer, [B, S, D].
        tokens: their number, S.
        causal: some self-attention lets a token see only what came before it.
    """

    kind = "decoder_stack"
    ROLES = ("input", "output")
    SIZES: ClassVar[Mapping[str, str]] = {"D": "width", "S": "tokens", "B": "batch"}

    input: fx.Node
    tokens: Size
    causal: bool

    def _variant(self) -> dict[str, str]:
        return {"causal": _yes(self.causal)}


@dataclass(eq=False)
class Layer:
    """One layer of a stack, delimited on the residual stream.

    Attributes:
        path: common module path prefix of the layer.
        index: position in the stack, from 0.
        input: residual-stream node that enters the layer (``[B, S, D]``).
        output: residual-stream node that leaves it: what the next layer, or the final norm, reads.
        attention: its (self-)attention region, if any.
        feed_forward: its feed-forward or MoE region, if any.
    """

    path: str
    index: int
    input: fx.Node
    output: fx.Node
    attention: AttentionRegion | None = None
    feed_forward: FeedForwardRegion | MoeRegion | None = None


@dataclass(eq=False)
class NearMiss:
    """Something that looked like a region and is not one.

    Attributes:
        kind: the region kind that was tried.
        reason: what was expected and what was found.
        node: the offending node.
        path: its module path. source: its ``file:line``.
        steps: what a region of this kind has to have, in words.
        passed: those of ``steps`` that it has.
    """

    kind: str
    reason: str
    node: fx.Node
    path: str = ""
    source: str = ""
    steps: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """How far the match got, 0..1: the share of the steps that passed. The highest is the nearest miss."""
        return len(self.passed) / len(self.steps) if self.steps else 0.0


R = TypeVar("R", bound=Region)


@dataclass(eq=False)
class Regions:
    """All regions of one graph, in graph order, and what nearly was one."""

    regions: list[Region] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)

    @overload
    def of(self, kind: type[R]) -> list[R]: ...

    @overload
    def of(self, kind: str) -> list[Region]: ...

    def of(self, kind: str | type[Any]) -> list[Any]:
        """The regions of a kind, or of a class."""
        if isinstance(kind, str):
            return [region for region in self.regions if region.kind == kind]
        return [region for region in self.regions if isinstance(region, kind)]

    @property
    def stacks(self) -> list[StackRegion]:
        """The regions that have layers."""
        return sorted(self.of(StackRegion), key=lambda region: STACKS.index(region.kind))

    def nearest_miss(self, kind: str) -> NearMiss | None:
        misses = [miss for miss in self.near_misses if miss.kind == kind]
        return max(misses, key=lambda miss: miss.score, default=None)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
