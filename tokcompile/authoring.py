"""The one import for people who write a pass; ``docs/write_a_pass.md`` goes through three of them.

=====================  ==============================================================================================
a class with a name    :func:`register`, :class:`PassParams`, :func:`about`, :class:`Budget`
what all passes are    :class:`Pass` (``observe``, ``prepare``, ``plan``, ``apply``), :class:`Context` (one graph being
                       rewritten), :class:`Seen` (what calibration saw), :class:`Taken` and :class:`LayerCut` (what
                       ``plan`` answers)
a choice of tokens     :class:`VisualSelection` where image features enter the language model, :class:`StagedSelection`
                       between its layers, :class:`PatchSelection` inside an encoder; all give :class:`Scores`
a choice of keys       :class:`SparseDecode`, in decode steps; gives :class:`Scores` too
a choice of blocks     :class:`BlockSelection`, in the prefill and in encoders; gives :class:`BlockLists`
helpers of a choice    :func:`segment_sizes`, :func:`segment_positions`, :func:`random_scores`, :func:`pooled`,
                       :func:`row_attention` ... : plain torch, the same in every runtime
what was found         :class:`Regions`: each a :class:`Region`, one class for each kind, with a field for each thing
                       that is known: :class:`AttentionRegion`, :class:`FeedForwardRegion`, :class:`MoeRegion`,
                       :class:`MergePoint`, and with a :class:`Layer` for each layer (:class:`StackRegion`)
                       :class:`DecoderStack`, :class:`VisionEncoder`, :class:`AudioEncoder` (:class:`EncoderRegion`)
its exact formula      :func:`read_attention`, :func:`read_mask`, :func:`read_rope`, :func:`read_feed_forward`
edits of a graph       those of :class:`Context`, :func:`ancestors`, :func:`erase`
a reason against       ``ctx.refuse(node, reason)`` makes a :class:`NarrowError`; :class:`UnprofitableError`,
                       :class:`CalibrationError`
=====================  ==============================================================================================

Everything here is plain torch and FX: no model library, no compiler and no exporter is imported. Names that are not
here may move from one release to the next.
"""

from __future__ import annotations

from tokcompile.capture.graph import ancestors, erase
from tokcompile.errors import CalibrationError, NarrowError, UnprofitableError
from tokcompile.families.pruning.drop import drop_visual
from tokcompile.families.pruning.patches import PatchParams, PatchSelection
from tokcompile.families.pruning.staged import StagedCut, StagedParams, StagedSelection, attention_to_tokens
from tokcompile.families.pruning.visual import VisualParams, VisualSelection
from tokcompile.families.scores import Scores
from tokcompile.families.sparse_attention.blocks.attend import BlockForm
from tokcompile.families.sparse_attention.blocks.base import BlockParams, BlockSelection
from tokcompile.families.sparse_attention.blocks.lists import BlockLists
from tokcompile.families.sparse_attention.decode.base import SparseDecode, SparseDecodeParams
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.formulas.attention_rows import attention_rows, class_row
from tokcompile.formulas.feed_forward import Formula as FeedForwardForm
from tokcompile.formulas.feed_forward import Projection
from tokcompile.formulas.feed_forward import read_formula as read_feed_forward
from tokcompile.formulas.mask import MaskForm, read_mask
from tokcompile.formulas.rope import Rope, read_rope
from tokcompile.kernels.activation import activate
from tokcompile.plan.pass_base import Pass, Seen
from tokcompile.plan.plan import LayerCut, Taken
from tokcompile.recipe.budget import Budget
from tokcompile.regions.model import (
    AttentionRegion,
    AudioEncoder,
    DecoderStack,
    EncoderRegion,
    FeedForwardRegion,
    Layer,
    MergePoint,
    MoeRegion,
    Region,
    Regions,
    StackRegion,
    VisionEncoder,
)
from tokcompile.registry import PassParams, about, register
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import (
    budgets,
    budgets_count,
    keep_mask,
    pooled,
    random_scores,
    rank_in_segment,
    row_attention,
    segment_positions,
    segment_sizes,
    segments,
)

__all__ = [
    "AttentionForm",
    "AttentionRegion",
    "AudioEncoder",
    "BlockForm",
    "BlockLists",
    "BlockParams",
    "BlockSelection",
    "Budget",
    "CalibrationError",
    "Context",
    "DecoderStack",
    "EncoderRegion",
    "FeedForwardForm",
    "FeedForwardRegion",
    "Layer",
    "LayerCut",
    "MaskForm",
    "MergePoint",
    "MoeRegion",
    "NarrowError",
    "Pass",
    "PassParams",
    "PatchParams",
    "PatchSelection",
    "Projection",
    "Region",
    "Regions",
    "Rope",
    "Scores",
    "Seen",
    "SparseDecode",
    "SparseDecodeParams",
    "StackRegion",
    "StagedCut",
    "StagedParams",
    "StagedSelection",
    "Taken",
    "UnprofitableError",
    "VisionEncoder",
    "VisualParams",
    "VisualSelection",
    "about",
    "activate",
    "ancestors",
    "attention_rows",
    "attention_to_tokens",
    "budgets",
    "budgets_count",
    "class_row",
    "drop_visual",
    "erase",
    "keep_mask",
    "pooled",
    "random_scores",
    "rank_in_segment",
    "read_attention",
    "read_feed_forward",
    "read_mask",
    "read_rope",
    "register",
    "row_attention",
    "segment_positions",
    "segment_sizes",
    "segments",
]
