"""The kinds of region: the words that recipes, passes and reports share."""

#: In the order in which reports show them.
KINDS = ("vision_encoder", "audio_encoder", "merge_point", "decoder_stack", "attention", "feed_forward", "moe")
#: The kinds that have layers.
STACKS = ("vision_encoder", "audio_encoder", "decoder_stack")
#: The kinds that are rewritten one by one, in place; a step for them can choose layers.
LOCAL = ("attention", "feed_forward", "moe")
