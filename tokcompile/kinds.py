"""The kinds of region: the words that recipes, passes and reports share; and the stages of a call."""

from __future__ import annotations

from enum import StrEnum

#: In the order in which reports show them.
KINDS = ("vision_encoder", "audio_encoder", "merge_point", "decoder_stack", "attention", "feed_forward", "moe")
#: The kinds that have layers.
STACKS = ("vision_encoder", "audio_encoder", "decoder_stack")
#: The kinds that are rewritten one by one, in place; a step for them can choose layers.
LOCAL = ("attention", "feed_forward", "moe")
#: The kinds of a sequence of tokens that image features enter.
MERGED = ("merge_point", "decoder_stack")


class Stage(StrEnum):
    """Which part of a call a graph is for."""

    ENCODER = "encoder"  #: an encoder that runs ahead of the forward
    PREFILL = "prefill"  #: a forward of many tokens, of a model that has a cache
    DECODE = "decode"  #: a forward of one token, behind others in a cache
    FORWARD = "forward"  #: a forward of a model without a cache
    WHOLE = "whole"  #: a whole call, whatever stages it had
