"""The processor of any model, with as many placeholders for an image as the recipe keeps features."""

from __future__ import annotations

from typing import Any

import torch

from tokcompile.errors import TokcompileError
from tokcompile.vllm.layout import Layout
from tokcompile.vllm.settings import Settings

#: Name under which an item's :class:`Layout` travels among its data.
FIELD = "tokcompile_layout"


class PrunedProcessor:
    """Goes in front of a subclass of vLLM's ``BaseMultiModalProcessor``; see :func:`prune_processor`."""

    tokcompile: Settings

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Cache keys, of the processor, the encoder and the prefix cache: they carry the recipe."""
        found = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {
            modality: [
                f"{key}-{self.tokcompile.key}" if modality in self.tokcompile.modalities else key for key in keys
            ]
            for modality, keys in found.items()
        }

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        """What takes the place of an image's mark in the prompt, shortened; each item's data get its layout."""
        found = dict(super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs))  # type: ignore[misc]
        for modality in self.tokcompile.modalities:
            if modality not in found:
                continue
            items = out_mm_kwargs.get(modality, [])
            if len(items) != len(found[modality]):
                raise TokcompileError(
                    f"tokcompile: {len(found[modality])} {modality} items have data of {len(items)}; this model cannot "
                    "be pruned"
                )
            found[modality] = [
                self._shortened(updates, item) for updates, item in zip(found[modality], items, strict=True)
            ]
        return found

    def _shortened(self, updates: Any, item: Any) -> list[Any]:
        """The updates of one item; where there are several ways to write it, all must hold the same features."""
        from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

        found = []
        layouts: list[Layout] = []
        for update in updates:
            ids = list(update.content.full)
            visual = update.content.is_embed
            flags = [True] * len(ids) if visual is None else [bool(v) for v in visual(ids)]
            layout = Layout(ids, flags)
            places = layout.pruned(self.tokcompile.keep)
            mask = torch.tensor([flags[place] for place in places], dtype=torch.bool)
            details = type(update.content)(
                full=[ids[place] for place in places], is_embed=None if all(flags) else _Mask(mask)
            )
            found.append(update.with_content(details))
            layouts.append(layout)
        if any(layout.visual != layouts[0].visual for layout in layouts):
            raise TokcompileError("tokcompile: an image can be written in ways of different length in the prompt")
        if layouts:
            item[FIELD] = MultiModalFieldElem(data=layouts[0].tensor(), field=MultiModalBatchedField(keep_on_cpu=True))
        return found


class _Mask:
    """Which of the tokens are placeholders, as vLLM asks for it."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, full: list[int]) -> torch.Tensor:
        return self.mask


def prune_processor(processor: Any, settings: Settings) -> Any:
    """The same as ``processor``, with the placeholders that ``settings`` leave.

    Raises:
        TokcompileError: it is not one that vLLM's interfaces can be put around.
    """
    from vllm.multimodal.processing import BaseMultiModalProcessor, EncDecMultiModalProcessor

    cls = type(processor)
    own = cls.apply not in (BaseMultiModalProcessor.apply,)
    if isinstance(processor, EncDecMultiModalProcessor) or not isinstance(processor, BaseMultiModalProcessor):
        raise TokcompileError(f"tokcompile: prompts that {cls.__name__} makes cannot be pruned")
    if own and not _calls_updates(cls):
        raise TokcompileError(
            f"tokcompile: {cls.__name__} writes placeholders in a way of its own (its apply), which cannot be pruned"
        )
    pruned = type(cls.__name__, (PrunedProcessor, cls), {"__module__": cls.__module__, "tokcompile": settings})
    made: Any = object.__new__(pruned)
    made.__dict__.update(processor.__dict__)
    return made


def _calls_updates(cls: type) -> bool:
    """Whether a processor with an ``apply`` of its own leaves the placeholders to that of vLLM."""
    for base in cls.__mro__:
        apply = base.__dict__.get("apply")
        if apply is not None:
            code = getattr(apply, "__code__", None)
            return code is not None and "super" in code.co_names and "apply" in code.co_names
    return False
