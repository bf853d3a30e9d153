"""A question about a picture, answered by onnxruntime alone.

    python examples/onnx_question.py export DIR [--recipe vlm_prune_90]     # torch, once
    python examples/onnx_question.py ask DIR PICTURE [QUESTION]             # numpy, onnxruntime, tokenizers, Pillow

The first writes the small vision-language model of ``small_vlm.py`` (a real ViT-S/14, SmolLM2-135M and the trained
projector) as ONNX files, with 90 % of the visual tokens dropped inside the decoder's graph, and the tokenizer beside
them. The second imports no torch and no transformers. What the model can and cannot do is in ``examples/README.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pictures import IMAGE_MEAN, IMAGE_STD, square_view
from PIL import Image
from tokenizers import Tokenizer

import tokcompile

QUESTION = "What kind of thing is it?"
TOKENS_PER_IMAGE = 256


def export(directory: Path, recipe: str | None, check: bool = True) -> tokcompile.ExportReport:
    """Write the model and its tokenizer to ``directory``."""
    from small_vlm import load_vlm

    model, processor = load_vlm()
    inputs = processor.prepare([_example()] * 2, [QUESTION, "What is in the picture?"])
    report = tokcompile.export_onnx(model, inputs, directory, recipe=recipe, check=check)
    processor.tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    return report


def _example() -> Image.Image:
    """A drawn picture, so that an export needs no file: a red square on white."""
    picture = Image.new("RGB", (224, 224), (255, 255, 255))
    picture.paste((200, 30, 30), (60, 60, 160, 160))
    return picture


def pixels(picture: Image.Image) -> NDArray[np.float32]:
    """``[1, 3, 224, 224]``, ImageNet mean and deviation."""
    values = np.asarray(square_view(picture), np.float32) / 255
    planes = (values - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return np.ascontiguousarray(planes.transpose(2, 0, 1)[None])


def ask(directory: Path, picture: Image.Image, question: str = QUESTION, max_new_tokens: int = 12) -> str:
    """The model's answer."""
    model = tokcompile.OnnxModel.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert model.generation is not None

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    ids = [
        *encode("<|im_start|>user\n"),
        *[model.generation["image_token_id"]] * TOKENS_PER_IMAGE,
        *encode("\n"),
        *encode(f"{question}<|im_end|>\n<|im_start|>assistant\n"),
    ]
    found = model.generate(np.array([ids]), pixel_values=pixels(picture), max_new_tokens=max_new_tokens)
    answer: str = tokenizer.decode(found[0, len(ids) :].tolist(), skip_special_tokens=True)
    return answer.strip()


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("export", help="write the ONNX files")
    writing.add_argument("directory", type=Path)
    writing.add_argument("--recipe", default="vlm_prune_90", help="'dense' for none (default: %(default)s)")
    writing.add_argument("--no-check", action="store_true", help="do not compare the files with the torch model")
    asking = commands.add_parser("ask", help="ask a question about a picture")
    asking.add_argument("directory", type=Path)
    asking.add_argument("picture", type=Path)
    asking.add_argument("question", nargs="?", default=QUESTION)
    options = parser.parse_args(argv)
    if options.command == "export":
        print(export(options.directory, None if options.recipe == "dense" else options.recipe, not options.no_check))
    else:
        with Image.open(options.picture) as picture:
            print(ask(options.directory, picture.copy(), options.question))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
