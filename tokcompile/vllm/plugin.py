"""What vLLM calls in each of its processes: :func:`register`, in the entry-point group ``vllm.general_plugins``.

Three functions of vLLM are put around, once for all models. What was asked for is read when a ``VllmConfig`` is made,
and travels with its ``model_config`` to every process:

=====================================  ==============================================================================
``VllmConfig.__post_init__``           the recipe is read and checked against the model: refusals come here
``MultiModalRegistry.create_processor``  prompts get as many placeholders as the recipe keeps
``get_model_architecture``             the model class becomes one that chooses behind its encoder
=====================================  ==============================================================================

Where nothing was asked for, all three do what they did.
"""

from __future__ import annotations

import functools
from typing import Any

from tokcompile.errors import TokcompileError
from tokcompile.vllm import settings as reading
from tokcompile.vllm.model import prune_model
from tokcompile.vllm.processor import prune_processor
from tokcompile.vllm.settings import Settings

#: Under this name the settings lie on vLLM's ``ModelConfig``.
_ATTRIBUTE = "_tokcompile"
_MARK = "__tokcompile__"
_classes: dict[tuple[Any, str, bool], Any] = {}


def register() -> None:
    """Put the plugin into this process; further calls change nothing.

    Raises:
        TokcompileError: this vLLM does not have what is put around. vLLM logs the failure of a plugin's *import* and
            goes on; what is raised here stops it.
    """
    try:
        from vllm.config import VllmConfig
        from vllm.model_executor import model_loader
        from vllm.model_executor.model_loader import utils
        from vllm.multimodal.registry import MultiModalRegistry

        made = VllmConfig.__post_init__
        processor = MultiModalRegistry.create_processor
        architecture = utils.get_model_architecture
    except (ImportError, AttributeError) as error:
        raise TokcompileError(
            f"tokcompile does not know this version of vLLM: {error}; it was tested with 0.32"
        ) from error
    if hasattr(made, _MARK):
        return

    @functools.wraps(made)
    def post_init(config: Any) -> None:
        made(config)
        _read(config)

    @functools.wraps(processor)
    def create_processor(registry: Any, model_config: Any, **kwargs: Any) -> Any:
        found = processor(registry, model_config, **kwargs)
        given = settings_of(model_config)
        return found if given is None else prune_processor(found, given)

    @functools.wraps(architecture)
    def get_model_architecture(model_config: Any) -> Any:
        cls, name = architecture(model_config)
        given = settings_of(model_config)
        if given is None or getattr(model_config, "is_submodel_config", False):
            return cls, name
        key = (cls, given.key, bool(model_config.uses_mrope))
        if key not in _classes:
            _classes[key] = prune_model(cls, given, bool(model_config.uses_mrope))
        return _classes[key], name

    setattr(post_init, _MARK, True)
    VllmConfig.__post_init__ = post_init
    MultiModalRegistry.create_processor = create_processor
    utils.get_model_architecture = get_model_architecture
    model_loader.get_model_architecture = get_model_architecture


def settings_of(model_config: Any) -> Settings | None:
    """What was asked for, for this model; None: nothing."""
    found = getattr(model_config, "__dict__", {}).get(_ATTRIBUTE)
    return found if isinstance(found, Settings) else None


def _read(config: Any) -> None:
    """Read what was asked for, check it, and put it on the configuration of the model."""
    model = config.model_config
    if model is None or getattr(model, "is_submodel_config", False):
        return
    asked = reading.asked(config.additional_config)
    if asked is None:
        return
    given = reading.read(asked)
    reading.check(given, config)
    object.__setattr__(model, _ATTRIBUTE, given)
