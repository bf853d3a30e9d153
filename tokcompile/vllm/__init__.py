"""The plugin for vLLM: visual tokens of any multimodal model that vLLM serves are chosen by a recipe.

    vllm serve MODEL --additional-config '{"tokcompile": {"recipe": "mine.yaml"}}'

vLLM fixes the length of a prompt before the encoder runs, and owns the cache. So the work is done in three places:

``processor``   each image gets K placeholders in the prompt instead of n, and cache keys carry the recipe
``model``       behind the encoder, the recipe chooses K of the n features, by :func:`tokcompile.select`'s code
``positions``   with rotary positions of several axes, each kept token gets the position that it had

``settings`` reads and checks what was asked for, ``layout`` is the arithmetic of placeholders and positions, and
``plugin`` puts all of it into vLLM, by its own interfaces and without a list of model classes. Nothing here imports
vLLM before vLLM has asked for the plugin.
"""
