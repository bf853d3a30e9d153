"""The function :func:`export_onnx`: stages, passes, files, check.

One file: most of it is the class of one export, which says why it is one.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.api import RecipeLike, optimize
from tokcompile.capture.sizes import hint
from tokcompile.errors import ExportError
from tokcompile.kinds import Stage as CallStage
from tokcompile.onnx_export import parity
from tokcompile.onnx_export.files import (
    INLINE_BYTES,
    complete_folder,
    save_configuration,
    save_manifest,
    save_model,
    versions,
)
from tokcompile.onnx_export.generative import (
    batch_inputs,
    check_kind,
    decoder_stage,
    embed_stage,
    generates,
    image_arguments,
    kv_shapes,
    vision_stage,
)
from tokcompile.onnx_export.lowering import TARGETS, Lowered, Stage, capture, doubled, lower, rewrite
from tokcompile.onnx_export.serving import FORMAT, FORMAT_VERSION, OnnxModel
from tokcompile.onnx_export.single import single_stage
from tokcompile.plan.plan import CutPlan
from tokcompile.prepare.calibrate import calibrate, check_prepared
from tokcompile.prepare.given import check_inputs, check_model
from tokcompile.recipes import Recipe
from tokcompile.runtime.install import SESSION
from tokcompile.runtime.session import Session
from tokcompile.state import PreparedState

#: Opset that every model was measured with.
OPSET = 20
OPSETS = range(18, 25)


@dataclass
class ExportReport:
    """What was written, and how close it is to the model.

    Attributes:
        directory: where the files are.
        manifest: what ``manifest.json`` says.
        parity: the rows of the check; empty with ``check=False``.
        tolerance: of the relative error.
        seconds: name of a phase -> seconds.
    """

    directory: Path
    manifest: dict[str, Any]
    parity: list[parity.Parity]
    tolerance: float
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "manifest": self.manifest,
            "tolerance": self.tolerance,
            "parity": [row.to_dict() for row in self.parity],
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        m = self.manifest
        recipe = m["recipe"]["name"] if m["recipe"] else "dense"
        lines = [f"{m['model']} ({m['kind']}, {recipe}), opset {m['opset']}, target {m['target']} -> {self.directory}"]
        for role, entry in m["files"].items():
            size = entry["weights_bytes"] / 1e6
            lines.append(
                f"  {role}: {entry['file']}, {entry['nodes']} nodes, {size:.1f} MB"
                + (f" in {entry['external_data']}" if entry["external_data"] else "")
            )
        for item in m["kept"]:
            layers = f"layers {item['layers'][0]}-{item['layers'][-1]}" if item["layers"] else "no layer"
            lines.append(f"  {item['stack']}: {layers} keep {item['tokens']} of {item['of']} tokens (given inputs)")
        lines += ["", parity.table(self.parity)] if self.parity else ["  not checked"]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    inputs: Mapping[str, Any],
    out_dir: str | PathLike[str],
    *,
    recipe: RecipeLike | None = None,
    calibration: Any = None,
    check: bool = True,
    opset: int = OPSET,
    target: str = "standard",
    logits: str = "last",
    axes: Mapping[str, Mapping[int, str]] | None = None,
    tolerance: float = parity.TOLERANCE,
    inline_bytes: int = INLINE_BYTES,
    overwrite: bool = False,
) -> ExportReport:
    """Write ``model`` as ONNX files, with the steps of ``recipe`` applied to the exported graphs.

    A model of one graph becomes ``model.onnx``; a decoder ``model.onnx`` with explicit keys and values; a
    vision-language model (``inputs`` with an image) three files under ``onnx/``. ``manifest.json`` says how they fit
    together, and :class:`tokcompile.OnnxModel` runs them.

    Args:
        model: in eval mode. Hugging Face models that generate are split; everything else is one graph.
        inputs: example arguments of ``forward`` by name, for a model that generates a prompt (at least 2 rows make
            nothing special; any number will do). Values matter for the check only.
        out_dir: folder; it appears when everything in it is complete.
        recipe: as for :func:`tokcompile.optimize`; None exports the dense model.
        calibration: as for :func:`tokcompile.optimize`.
        check: run the files against the model (for a recipe: against ``optimize(model, recipe)``), on ``inputs`` and
            on others of other shapes, and write nothing when an output is off.
        opset: of the standard operations, 18 to 24.
        target: "standard" (ONNX operations only) or "contrib" (fused operations of onnxruntime).
        logits: "last": of the last position only, ``[B, 1, V]``, or "all".
        axes: for models of one graph: input -> {dimension: name} of what may change size; default: batch and sequence.
        tolerance: largest relative error of an output.
        inline_bytes: weights beyond this many bytes go into ``<file>.onnx_data``.
        overwrite: replace an earlier export.

    Raises:
        ExportError: something in the model has no ONNX form (names the node, its source line and the way out), or the
            files are off.
        NoMatchError, RecipeError: as for ``optimize``.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset}: choose one of {OPSETS[0]} to {OPSETS[-1]} ({OPSET} unless there is a need)")
    if target not in TARGETS:
        raise ExportError(f"target={target!r}: choose one of {', '.join(TARGETS)}")
    if logits not in ("last", "all"):
        raise ExportError(f"logits={logits!r}: choose 'last' or 'all'")
    check_model(model, "export_onnx", ExportError)
    check_inputs(model, inputs, "export_onnx", ExportError)
    if hasattr(model, SESSION):
        raise ExportError("this model is optimized already; export the original model with recipe=")
    if model.training:
        raise ExportError("the model is in training mode; call model.eval() first")
    loaded = None if recipe is None else Recipe.load(recipe)
    if loaded is not None:
        check_prepared(loaded, calibration)
        if calibration is not None and not isinstance(calibration, PreparedState):
            calibration = calibrate(model, loaded, calibration)
    elif calibration is not None:
        raise ExportError("calibration without a recipe has no use; leave it out")
    job = _Job(model, dict(inputs), loaded, calibration, opset, target, logits == "last", axes)
    started = time.perf_counter()
    job.lower()
    exported = time.perf_counter()
    with complete_folder(out_dir, overwrite) as folder:
        manifest = job.write(folder, inline_bytes)
        rows = job.check(folder, tolerance) if check else []
    seconds = {"export": exported - started, "write and check": time.perf_counter() - exported}
    return ExportReport(Path(out_dir), manifest, rows, tolerance, seconds)


class _Job:
    """One export.

    One class: lowering, writing and checking read the same settings and the same lowered stages.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        recipe: Recipe | None,
        calibration: PreparedState | None,
        opset: int,
        target: str,
        last: bool,
        axes: Mapping[str, Mapping[int, str]] | None,
    ) -> None:
        self.model, self.inputs, self.recipe, self.calibration = model, inputs, recipe, calibration
        self.opset, self.target, self.last, self.axes = opset, target, last, axes
        self.session = Session(recipe, lowering="eager", model=type(model).__name__, state=calibration)
        self.lowered: dict[str, Lowered] = {}
        self.paths: dict[str, str] = {}
        self.generation: dict[str, Any] | None = None
        self.kept: list[dict[str, Any]] = []
        self.per_image = 0
        images = [n for n, v in inputs.items() if isinstance(v, Tensor) and n.startswith("pixel_values")]
        self.kind = (
            "single" if axes is not None or not generates(model) else ("vision_language" if images else "decoder")
        )
        if self.kind == "decoder" and hasattr(model.base_model, "get_image_features"):
            raise ExportError(
                f"{type(model).__name__} takes images; give inputs with an image (pixel_values and the "
                "placeholder tokens for it)"
            )

    # .. graphs

    def lower(self) -> None:
        self._check_steps()
        if self.kind == "single":
            self._stage("model", "model.onnx", single_stage(self.model, self.inputs, self.axes), "forward")
        else:
            check_kind(self.model)
            self._generative()
        self.session.check_matches(CallStage.WHOLE)

    def _check_steps(self) -> None:
        """Refuse steps for one kind of call, where one file serves all of them, and positions that it cannot move.

        Raises:
            ExportError: names the steps and the way out.
        """
        problems = []
        for number, (step, method) in enumerate(self.session.passes):
            if getattr(step.params, "positions", "keep") != "keep":
                problems.append(
                    f"steps[{number}] ({step.pass_}): positions: {step.params.positions} is right in front "
                    "of an empty past alone, and one exported graph serves a past of any length; use "
                    "positions: keep, or tokcompile.optimize"
                )
            if method.stage == "any" or (method.stage == "prefill" and self.kind == "single"):
                continue
            other = "decode steps" if method.stage == "prefill" else "the prefill"
            problems.append(
                f"steps[{number}] ({step.pass_}): changes the attention of "
                f"{'the prefill' if method.stage == 'prefill' else 'decode steps'} alone, and one exported graph "
                f"serves {other} too, with keys of a past of any length; leave the step out of the recipe, or use "
                "tokcompile.optimize"
            )
        if problems:
            raise ExportError("\n".join(problems))

    def _stage(self, role: str, path: str, stage: Stage, name: str, passes: bool = True) -> list[int]:
        """Capture, rewrite and convert one stage; the first layers below the cuts that were made."""
        found = capture(stage)
        ctx = None
        if self.recipe is not None and passes:
            ctx = rewrite(found, self.session, name)
            self._note_kept(name, ctx)
        if name in ("forward", "prefill"):
            self.session.check_matches(CallStage(name))
        self.lowered[role] = lower(found, ctx, opset=self.opset, target=self.target)
        self.paths[role] = path
        return sorted({kept.layer for kept in ctx.cuts.kept}) if ctx is not None else []

    def _generative(self) -> None:
        model, session = self.model, self.session
        ids, mask, rest = batch_inputs(self.inputs)
        given = {"input_ids": ids, "attention_mask": mask, **rest}
        rest = doubled(given, {name: {0: "rows"} for name in given})  # pictures with the rows that show them
        ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
        if bool((mask[:, -1] == 0).any()):
            raise ExportError("rows of the prompt are padded on the right; pad on the left")
        images = self.kind == "vision_language"
        token = image_token(model) if images else None
        features = scores = None
        if images:
            stage = vision_stage(model, image_arguments(model, rest), session.wants_scores)
            with torch.no_grad():
                made = stage.module(stage.inputs)
            features = made["image_features"].reshape(-1, made["image_features"].shape[-1])
            count = int(ids.eq(token).sum())  # type: ignore[arg-type]
            if count != len(features):
                raise ExportError(f"{count} placeholder tokens ({token}) in input_ids, {len(features)} image features")
            pictures = made["image_features"].shape[0] if made["image_features"].dim() == 3 else 1
            self.per_image = len(features) // pictures
            self._stage("vision_encoder", "onnx/vision_encoder.onnx", stage, "encoder")
            if session.wants_scores:
                scores = made["image_scores"]
                if not session.scored_features:
                    session.check_matches(CallStage.PREFILL)
            self._stage("embed_tokens", "onnx/embed_tokens.onnx", embed_stage(model, ids), "embedding", passes=False)
        elif rest:
            raise ExportError(f"inputs {', '.join(rest)}: a decoder takes input_ids and attention_mask")
        merges = images and any(m.regions in ("merge_point", "decoder_stack") for _, m in session.passes)
        common: dict[str, Any] = {
            "last": self.last,
            "features": features,
            "scores": scores,
            "merges": merges,
            "images": images,
            "token": token,
        }
        self._check_split(ids, mask, rest, features, token)
        groups = self._groups()
        path, described = "onnx/decoder_model_merged.onnx" if images else "model.onnx", len(self.kept)
        stage = decoder_stage(model, ids, mask, groups=groups, **common)
        made = self._stage("decoder", path, stage, "prefill")
        if made != [group[0] for group in groups]:  # a step that may stay without a region did
            groups = CutPlan(tuple(made)).groups(len(kv_shapes(model)))
            del self.kept[described:]
            self._stage("decoder", path, decoder_stage(model, ids, mask, groups=groups, **common), "prefill")
        self._describe(groups, token)

    @functools.cached_property
    def reference(self) -> nn.Module:
        """What the files have to be equal to."""
        if self.recipe is None:
            return self.model
        return optimize(self.model, self.recipe, calibration=self.calibration, lowering="eager")

    def _groups(self) -> list[list[int]]:
        """Which layers of the language model are cut alike, as the recipe plans it."""
        depth = len(kv_shapes(self.model))
        starts = {layer for _, method in self.session.passes for layer in method.cut_layers(depth)}
        return CutPlan(tuple(sorted(starts))).groups(depth)

    def _check_split(
        self, ids: Tensor, mask: Tensor, rest: dict[str, Tensor], features: Tensor | None, token: int | None
    ) -> None:
        """The parts of the split, put together in torch, against the model itself.

        Raises:
            ExportError: the model does something between or around the parts that the split leaves out.
        """
        stage = decoder_stage(
            self.model,
            ids,
            mask,
            groups=[],
            last=True,
            features=features,
            images=features is not None,
            merges=features is not None,
            cached=False,
            token=token,
        )
        with torch.no_grad():
            found = stage.module(stage.inputs)["logits"][:, -1].float()
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                **rest,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        row = parity.compare("given", "logits", found.cpu(), out.logits[0].float().cpu())
        if not row.relative <= 1e-4:
            base: Any = self.model.base_model
            raise ExportError(
                f"{type(self.model).__name__}: image encoder, embedding and decoder, put together, do not give the "
                f"logits of the model (relative error {row.relative:.1e} before any export): the model hands something "
                "else from the prompt or the images to its decoder, which "
                f"{type(self.model).__name__}.forward [{_source(base.forward)}] shows; no input "
                "of an exported decoder carries it. Use tokcompile.optimize for this model"
            )

    # .. what is said about it

    def _note_kept(self, name: str, ctx: Any) -> None:
        before = {
            layer["stack_path"]: layer["tokens_before"]
            for layer in self.session.report.layers
            if layer["stage"] == name and layer["index"] == 0
        }
        for region in ctx.regions.stacks:
            path = region.path or name
            cuts = {
                k.layer: k
                for k in ctx.cuts.kept
                if not region.layers or any(k.path == layer.path for layer in region.layers)
            }
            if not cuts:
                continue
            starts = sorted(cuts)
            for start, end in zip(starts, [*starts[1:], len(region.layers)], strict=True):
                kept = cuts[start].node.meta["val"].shape[1]
                self.kept.append(
                    {
                        "stack": path,
                        "layers": list(range(start, end)),
                        "tokens": hint(kept),
                        "of": before[region.path],
                    }
                )

    def _describe(self, groups: list[list[int]], token: int | None) -> None:
        config: Any = getattr(self.model, "generation_config", None)
        self.generation = {
            "layers": len(kv_shapes(self.model)),
            "logits": "last" if self.last else "all",
            "image_token_id": token,
            "eos_token_id": getattr(config, "eos_token_id", None),
            "pad_token_id": getattr(config, "pad_token_id", None),
            "suppress_tokens": getattr(config, "suppress_tokens", None),
            # no file sees ids and features both; OnnxModel.generate counts them
            "checks": [] if token is None else ["input_ids hold one image_token_id for each row of image_features"],
            "cache_groups": [
                {"layers": group, "positions": f"past_positions.{i}", "length": f"past_length_{i}"}
                for i, group in enumerate(groups)
            ],
            "sizes": {"in_graph": sorted(self.lowered["decoder"].sizes)},
        }

    def write(self, folder: Path, inline_bytes: int) -> dict[str, Any]:
        files = {
            role: save_model(lowered, folder, self.paths[role], inline_bytes) for role, lowered in self.lowered.items()
        }
        recipe = None
        if self.recipe is not None:
            steps = [
                {
                    "pass": e.pass_name,
                    "matches": e.matches,
                    "regions": e.regions,
                    "details": e.details,
                    "flop_ratio": e.flop_ratio,
                }
                for e in self.session.report.steps
            ]
            recipe = {
                "name": Path(self.recipe.name).name,
                "steps": plain(steps),
                "source": self.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            }
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "model": type(self.model).__name__,
            "opset": self.opset,
            "target": self.target,
            "dtype": str(next(iter(self.model.parameters()), torch.empty(0)).dtype).removeprefix("torch."),
            "files": files,
            "generation": self.generation,
            "recipe": recipe,
            "kept": self.kept,
            "versions": versions(),
        }
        save_configuration(self.model, folder)
        save_manifest(folder, manifest)
        return manifest

    # .. check

    def check(self, folder: Path, tolerance: float) -> list[parity.Parity]:
        model = OnnxModel.from_pretrained(folder, providers=["CPUExecutionProvider"])
        if self.kind == "single":
            checks = parity.check_single(model, self.reference, self.inputs, self.lowered["model"].stage.axes)
        else:
            checks = parity.check_generation(
                model, self.reference, self.inputs, (self.generation or {})["image_token_id"], self.per_image
            )
        rows: list[parity.Parity] = []
        with _fixed_sizes():
            for found, tensors in checks:
                rows += found
                if parity.failed(found, tolerance):
                    parity.raise_failed(rows, tolerance, functools.partial(self._culprit, folder, tensors, tolerance))
        return rows

    def _culprit(self, folder: Path, tensors: Mapping[str, Tensor], tolerance: float) -> str:
        """Look for the first wrong node, file by file, on the inputs that failed."""
        found = "none found"
        for role, lowered in self.lowered.items():
            feed = (
                {n: v.cpu().numpy() for n, v in tensors.items()}
                if role == "model"
                else {n: v.detach().cpu().numpy() for n, v in lowered.stage.inputs.items()}
            )
            try:
                found = f"{role}: " + parity.worst_node(lowered, folder / self.paths[role], feed, tolerance)
            except Exception as error:  # the search must not hide what was found before
                found = f"{role}: could not be searched ({type(error).__name__}: {str(error)[:200]})"
            if "relative error" in found:
                return found
        return found


def _fixed_sizes() -> Any:
    """The reference is captured anew for each of the few sizes: that takes a third of the time of a capture with
    symbolic sizes, which one would not do either (numbers of rows and of pictures are fixed in it)."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)


def image_token(model: nn.Module) -> int:
    """The token id that stands for an image feature in the prompt."""
    config: Any = model.config
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ExportError(f"{type(model).__name__}: its configuration names no image_token_id")


def _source(function: Any) -> str:
    function = inspect.unwrap(function)
    return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"


def plain(value: Any) -> Any:
    """As plain JSON types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return (
        value
        if isinstance(value, (str, int, float, bool, type(None)))
        else hint(value)
        if isinstance(value, torch.SymInt)
        else str(value)
    )
