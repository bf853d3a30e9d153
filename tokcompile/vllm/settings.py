"""What a deployment asks for: read from vLLM's configuration or the environment, and checked when it starts."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokcompile.errors import NoMatchError, RecipeError, TokcompileError
from tokcompile.families.pruning.select import selection
from tokcompile.families.pruning.visual import VisualSelection
from tokcompile.recipe import overrides
from tokcompile.recipes import Budget, Recipe

#: The key in ``--additional-config``, and the environment variable that stands for it.
KEY, VARIABLE = "tokcompile", "TOKCOMPILE_VLLM"
_KNOWN = ("recipe", "set")
#: Kinds of input whose tokens are visual.
VISUAL = ("image", "video")


@dataclass(frozen=True)
class Settings:
    """A recipe that this deployment serves.

    Attributes:
        data: the complete recipe, as plain data (it goes from process to process).
        modalities: the kinds of input that it is for.
        key: what tells its choices from those of other recipes, in cache keys.
    """

    data: str
    modalities: tuple[str, ...]
    key: str

    @property
    def method(self) -> VisualSelection:
        """The choice."""
        return _method(self.data)

    @property
    def keep(self) -> Budget:
        """How many tokens are kept of each run of visual tokens."""
        keep: Budget = self.method.params.keep
        return keep

    @property
    def positions(self) -> str:
        """``keep`` or ``compact``."""
        return str(getattr(self.method.params, "positions", "keep"))


def asked(additional: object) -> object | None:
    """What was asked for: of ``--additional-config``, else of the environment; None: nothing."""
    if isinstance(additional, Mapping) and KEY in additional:
        return additional[KEY]  # type: ignore[no-any-return]
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if not text.lstrip().startswith("{"):
        return {"recipe": text}
    try:
        return json.loads(text)  # type: ignore[no-any-return]
    except ValueError as error:
        raise RecipeError(f"{VARIABLE}: not JSON: {error}") from None


def read(given: object) -> Settings:
    """Check what was asked for.

    Args:
        given: ``{"recipe": a shipped name, a path or a recipe as data, "set": places and their values}``; ``set`` is a
            mapping, or a list of ``PLACE=VALUE`` as the command line takes it.

    Raises:
        RecipeError: the recipe, or this mapping, is not valid.
        NoMatchError: a step of it cannot be served; says which, why, and what to do.
    """
    if isinstance(given, str):
        given = {"recipe": given}
    if not isinstance(given, Mapping) or "recipe" not in given:
        raise RecipeError(f'{KEY}: expected {{"recipe": ...}}, found {given!r}')
    unknown = sorted(set(given) - set(_KNOWN))
    if unknown:
        raise RecipeError(f"{KEY}: unknown key {', '.join(unknown)} (known: {', '.join(_KNOWN)})")
    changes = given.get("set") or {}
    if not isinstance(changes, Mapping):
        changes = overrides.parse(changes)
    recipe = Recipe.load(given["recipe"], dict(changes))
    try:
        method = selection(recipe)
        if method.scores_features:
            raise NoMatchError(
                f"steps[0] ({method.name}): chooses by attention inside the image encoder, which vLLM does not give "
                "out; use todre or another choice by features"
            )
    except NoMatchError as error:
        raise NoMatchError(
            f"recipe {recipe.name or 'of the configuration'} cannot be served by vLLM: {error}"
        ) from None
    modality = recipe.steps[0].target.modality
    step = recipe.to_dict()["steps"][0]
    data = {"recipe_version": 1, "steps": [step]}
    text = json.dumps(data, sort_keys=True)
    key = hashlib.sha256(f"{_version()} {text}".encode()).hexdigest()[:16]
    return Settings(text, VISUAL if modality is None else (modality,), key)


def check(settings: Settings, config: Any) -> None:
    """Refuse what vLLM cannot do with this model and configuration; ``config`` is its ``VllmConfig``.

    Raises:
        TokcompileError: says what, and what to do.
    """
    model = config.model_config
    who = f"tokcompile cannot prune {model.model}"
    if not model.is_multimodal_model:
        raise TokcompileError(f"{who}: vLLM serves it as a model of text alone, without visual tokens")
    if model.is_encoder_decoder:
        raise TokcompileError(
            f"{who}: its decoder reads images by cross-attention, and vLLM gives them no placeholders"
        )
    if model.multimodal_config is not None and model.multimodal_config.is_multimodal_pruning_enabled():
        raise TokcompileError(f"{who}: --video-pruning-rate prunes already; use one of the two")
    if getattr(config.compilation_config, "cudagraph_mm_encoder", False):
        raise TokcompileError(f"{who}: encoders in CUDA graphs go around the choice; set cudagraph_mm_encoder to false")
    _check_positions(settings, config, who)


def _check_positions(settings: Settings, config: Any, who: str) -> None:
    several = bool(config.model_config.uses_mrope)
    place = "steps[0].params.positions"
    if not several and settings.positions != "compact":
        raise TokcompileError(
            f"{who} with positions: keep: vLLM counts positions of one axis without gaps; set {place} to compact "
            f'(\'"set": {{"{place}": "compact"}}\')'
        )
    if several and settings.positions != "keep":
        raise TokcompileError(
            f"{who} with positions: compact: its positions have several axes and say where a token is in its image; "
            f"set {place} to keep"
        )
    if several and config.speculative_config is not None:
        raise TokcompileError(f"{who}: speculative decoding with positions of several axes; leave it out")
    if several and config.use_v2_model_runner:
        raise TokcompileError(
            f"{who}: the second model runner hands out no positions of several axes; set VLLM_USE_V2_MODEL_RUNNER=0"
        )


@functools.lru_cache(maxsize=64)
def _method(data: str) -> VisualSelection:
    return selection(json.loads(data))


def _version() -> str:
    from tokcompile.version import __version__

    return __version__
