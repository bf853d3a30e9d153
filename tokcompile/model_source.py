"""Models by name, for the command line: a folder, a hub name, or ``module:function``; and inputs to try them on."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokcompile.errors import TokcompileError

_FUNCTION = re.compile(r"(?P<module>[^:]+):(?P<name>[A-Za-z_]\w*)")


class ModelNotFoundError(TokcompileError):
    """No model of that name can be loaded, or no inputs can be made for it. The message says what to do."""


@dataclass(frozen=True)
class Request:
    """How to load a model and what to feed it.

    Attributes:
        name: a folder, a hub name, or ``module:function`` (``file.py:function``).
        prompt, images: of the input, where a tokenizer or processor is there; left out, random ones of fitting shape.
        tokens: length of a random prompt. batch: rows of random inputs.
        dtype, device: of the model; left out, as stored and on the CPU.
        random_weights: build the model from its configuration alone.
    """

    name: str
    prompt: str = ""
    images: Sequence[Path] = field(default_factory=list)
    tokens: int = 64
    batch: int = 1
    dtype: str = ""
    device: str = ""
    random_weights: bool = False


def load(request: Request) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, and keyword arguments of its ``generate`` or ``forward``.

    Raises:
        ModelNotFoundError: see there.
    """
    is_path = Path(request.name).exists()
    match = None if is_path else _FUNCTION.fullmatch(request.name)
    model, inputs = _from_function(match["module"], match["name"]) if match else _from_transformers(request)
    if request.dtype:
        dtype = getattr(torch, request.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise TokcompileError(f"--dtype {request.dtype}: write float32, bfloat16 or float16")
        model = model.to(dtype)
        inputs = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }
    if request.device:
        try:
            model = model.to(request.device)
        except (RuntimeError, AssertionError) as error:
            raise TokcompileError(f"--device {request.device}: {_line(error)}") from None
        inputs = {k: v.to(request.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return model.eval(), inputs


# ------------------------------------------------------------------------------------------------------- functions


def _from_function(module: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    made = call_function(module, name)
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], Mapping)
    ):
        raise ModelNotFoundError(
            f"{module}:{name} should return (model, inputs): a torch.nn.Module and a dict of "
            f"keyword arguments; it returned {type(made).__name__}"
        )
    return made[0], dict(made[1])


def call_function(module: str, name: str) -> Any:
    """What a function of an importable module, or of a file, returns.

    Raises:
        ModelNotFoundError: there is no such module or function, or it failed.
    """
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None or not Path(module).is_file():
                raise ModelNotFoundError(f"{module}: no such file")
            found = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = found
            spec.loader.exec_module(found)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # a module beside the user
            found = importlib.import_module(module)
        function = getattr(found, name, None)
        if not callable(function):
            near = [
                n
                for n, value in vars(found).items()
                if not n.startswith("_") and inspect.isfunction(value) and value.__module__ == found.__name__
            ]
            from tokcompile.registry import did_you_mean

            raise ModelNotFoundError(f"{module} has no function {name!r}{did_you_mean(name, near)}")
        return function()
    except TokcompileError:
        raise
    except Exception as error:  # the user's own code
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ModelNotFoundError(
                f"there is no module {error.name!r} to import, and no folder {module}:{name}; "
                "MODEL is a folder, a hub name, module:function or file.py:function"
            ) from None
        raise ModelNotFoundError(f"{module}:{name} failed: {type(error).__name__}: {_line(error)}") from error


# ---------------------------------------------------------------------------------------------------- transformers


def _from_transformers(request: Request) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    name = request.name
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "tokcompile.json").is_file():
            raise ModelNotFoundError(
                f"{name} was written by tokcompile.save_pretrained: it is optimized already; load "
                "it with tokcompile.load, and start from the original model here"
            )
        raise ModelNotFoundError(f"{name}: a folder without config.json; expected a model saved by save_pretrained")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or " " in name):
        raise ModelNotFoundError(f"{name}: no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model_class = _model_class(config)
        if request.random_weights:
            torch.manual_seed(0)
            model = (
                model_class._from_config(config)
                if hasattr(model_class, "_from_config")
                else model_class.from_config(config)
            )
        else:
            model = model_class.from_pretrained(name)
    except Exception as error:  # every kind of trouble that files, networks and configurations can make
        hint = (
            ""
            if folder.is_dir()
            else ("; MODEL is a folder, a name on the hub, or module:function that returns (model, inputs)")
        )
        raise ModelNotFoundError(f"{name} cannot be loaded: {type(error).__name__}: {_line(error)}{hint}") from error
    return model, _inputs(model, request)


def _model_class(config: Any) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _inputs(model: Any, request: Request) -> dict[str, Any]:
    if request.prompt or request.images:
        return _processed(request)
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" and not hasattr(config, "text_config"):
        return {"pixel_values": _pixels(config, request.batch, request.name)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if main != "input_ids" or not vocabulary:
        raise ModelNotFoundError(
            f"{request.name}: no inputs can be made up for {type(model).__name__} (it takes "
            f"{main}); write a function that returns (model, inputs) and name it module:function"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (request.batch, request.tokens), generator=generator)
    special = [v for k, v in vars(config).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)]
    for token in special:
        ids[ids == token] = min(10, vocabulary - 1)
    inputs: dict[str, Any] = {"input_ids": ids}
    image = next((getattr(config, k) for k in ("image_token_id", "image_token_index") if hasattr(config, k)), None)
    if image is not None and hasattr(model.base_model, "get_image_features"):
        pixels = _pixels(config.vision_config, request.batch, request.name).to(model.dtype)
        try:
            with torch.no_grad():
                features = model.base_model.get_image_features(pixel_values=pixels).pooler_output
            count = sum(f.numel() // f.shape[-1] for f in features) // request.batch
        except Exception as error:
            raise ModelNotFoundError(
                f"{request.name}: no picture can be made up for {type(model).__name__} "
                f"({_line(error)}); give --image and --prompt, or module:function"
            ) from error
        ids = torch.cat([ids[:, :4], torch.full((request.batch, count), image), ids[:, 4:]], 1)
        inputs = {"input_ids": ids, "pixel_values": pixels}
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def _pixels(config: Any, batch: int, name: str) -> torch.Tensor:
    size = getattr(config, "image_size", None)
    if size is None:
        raise ModelNotFoundError(
            f"{name}: its configuration has no image_size to make up a picture; give --image and "
            "--prompt, or module:function"
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, int(getattr(config, "num_channels", 3)), height, width, generator=generator)


def _processed(request: Request) -> dict[str, Any]:
    """Inputs from the model's own processor or tokenizer."""
    import transformers

    prompt = request.prompt or "What is in the picture?"
    try:
        if not request.images:
            tokenizer = transformers.AutoTokenizer.from_pretrained(request.name)
            return dict(tokenizer([prompt] * request.batch, return_tensors="pt"))
        from PIL import Image

        pictures = [Image.open(path).convert("RGB") for path in request.images]
        processor: Any = transformers.AutoProcessor.from_pretrained(request.name)  # type: ignore[no-untyped-call]
        if getattr(processor, "chat_template", None):
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        elif not hasattr(processor, "tokenizer"):
            return dict(processor(images=pictures, return_tensors="pt"))
        return dict(processor(images=pictures, text=prompt, return_tensors="pt"))
    except ImportError as error:
        raise ModelNotFoundError(f"--image needs pillow: pip install pillow ({_line(error)})") from error
    except Exception as error:
        raise ModelNotFoundError(
            f"{request.name}: its processor cannot read the prompt or the images: "
            f"{type(error).__name__}: {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    """The first sentence of an error, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
