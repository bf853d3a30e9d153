"""Do the files compute what the model computes? The same inputs through both, on the given shapes and on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tokcompile.errors import ExportError
from tokcompile.onnx_export.generative import batch_inputs
from tokcompile.onnx_export.lowering import Lowered
from tokcompile.onnx_export.serving import OnnxModel
from tokcompile.onnx_export.single import named_outputs

#: Largest relative error of an output: ``|found - wanted| / |wanted|``, by 2-norm.
TOLERANCE = 1e-4
#: Decode steps that are compared.
STEPS = 8


@dataclass
class Parity:
    """One output on one set of inputs.

    Attributes:
        inputs: what the inputs were ("given" or the sizes that were drawn).
        output: its name; ``logits`` of all steps together for generation.
        max_abs, relative: largest and relative difference; infinite where shapes differ.
        tokens_equal: whether generation gave the same tokens (None for other outputs).
    """

    inputs: str
    output: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    tokens_equal: bool | None = None

    def passes(self, tolerance: float) -> bool:
        return self.relative <= tolerance and self.tokens_equal is not False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


def compare(inputs: str, output: str, found: Any, wanted: Any, tokens_equal: bool | None = None) -> Parity:
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape:
        return Parity(
            inputs,
            f"{output} {tuple(found.shape)} for {tuple(wanted.shape)}",
            wanted.shape,
            np.inf,
            np.inf,
            tokens_equal,
        )
    if wanted.dtype.kind in "biu":
        different = float((found != wanted).mean()) if wanted.size else 0.0
        return Parity(inputs, output, wanted.shape, different, different, tokens_equal)
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    same = np.isfinite(b)
    if not np.array_equal(same, np.isfinite(a)):
        return Parity(inputs, output, wanted.shape, np.inf, np.inf, tokens_equal)
    a, b = a[same], b[same]
    norm = float(np.linalg.norm(b))
    difference = float(np.linalg.norm(a - b))
    return Parity(
        inputs,
        output,
        wanted.shape,
        float(np.abs(a - b).max(initial=0)),
        difference / norm if norm else difference,
        tokens_equal,
    )


def check_single(
    model: OnnxModel, reference: nn.Module, inputs: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]
) -> Iterator[tuple[list[Parity], dict[str, Any]]]:
    """Compare every output, on the given inputs and on three draws of other sizes."""
    constants = {n: v for n, v in inputs.items() if not isinstance(v, Tensor)}
    for label, tensors in _draws({n: v for n, v in inputs.items() if isinstance(v, Tensor)}, axes):
        with torch.no_grad():
            wanted = named_outputs(reference(**tensors, **constants))
        found = model(**{n: v.cpu().numpy() for n, v in tensors.items()})
        yield [compare(label, name, found[name], wanted[name].cpu()) for name in found], tensors


def _draws(inputs: dict[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "given", inputs
    given = {axis: inputs[name].shape[dim] for name, dims in axes.items() for dim, axis in dims.items()}
    generator = torch.Generator().manual_seed(0)
    for number, batch in enumerate((1, 2, 5)):
        sizes = {
            axis: (
                batch + (axis != "batch_size") * number
                if axis.endswith("batch_size")
                else max(2, (size * (3 + 2 * number)) // 5)
            )
            for axis, size in given.items()
        }
        drawn = {}
        for name, value in inputs.items():
            shape = [sizes[axes.get(name, {})[d]] if d in axes.get(name, {}) else s for d, s in enumerate(value.shape)]
            drawn[name] = _draw(value, shape, generator)
        yield ", ".join(f"{a} {s}" for a, s in sizes.items()) or f"draw {number}", drawn


def _draw(like: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random values of the kind of ``like``: normal with its mean and deviation, or whole numbers among its own."""
    if like.is_floating_point():
        scale = like.float().std(unbiased=False) if like.numel() > 1 else torch.ones(())
        noise = torch.randn(list(shape), generator=generator).to(like.device)
        return (noise * scale + like.float().mean()).to(like.dtype)
    flat = like.reshape(-1)
    if bool((flat.to(torch.int64) >> 1 == 0).all()):  # a mask: its own rows again, so that none is left empty
        for dim, size in enumerate(shape):
            like = like.index_select(dim, torch.arange(size, device=like.device) % like.shape[dim])
        return like
    return flat[torch.randint(flat.numel(), list(shape), generator=generator).to(like.device)]


# ------------------------------------------------------------------------------------------------------- generation


def check_generation(
    model: OnnxModel, reference: nn.Module, inputs: Mapping[str, Any], token: int | None, per_image: int
) -> Iterator[tuple[list[Parity], dict[str, Any]]]:
    """Compare tokens and logits of :data:`STEPS` steps, on the given prompts and on others of other shapes."""
    vocabulary = int(reference.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    for label, drawn in prompts(inputs, token, per_image):
        logits: list[Any] = []
        arrays: dict[str, Any] = {n: v.cpu().numpy() for n, v in drawn.items()}
        found = model.generate(**arrays, max_new_tokens=STEPS + 1, eos_token_id=-1, on_logits=logits.append)
        with torch.no_grad():
            out = reference.generate(  # type: ignore[operator]
                **drawn,
                max_new_tokens=STEPS + 1,
                do_sample=False,
                num_beams=1,
                eos_token_id=vocabulary,
                return_dict_in_generate=True,
                output_logits=True,
            )
        length = drawn["input_ids"].shape[1]
        equal = np.array_equal(found[:, length:], out.sequences[:, length:].cpu().numpy())
        wanted = torch.stack(out.logits, 1).float().cpu()
        first = compare(
            label,
            "prefill logits",
            logits[0],
            wanted[:, 0],
            bool((found[:, length] == out.sequences[:, length].cpu().numpy()).all()),
        )
        rest = compare(label, f"logits of {STEPS} steps", np.stack(logits[1:], 1), wanted[:, 1:], equal)
        yield [first, rest], drawn


def prompts(inputs: Mapping[str, Any], token: int | None, per_image: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The given prompts; one row of them; a padded batch of other lengths; more rows than given."""
    ids, mask, images = batch_inputs(inputs)
    yield "given", {"input_ids": ids, "attention_mask": mask, **images}
    generator = torch.Generator().manual_seed(0)
    text = ids[(mask > 0) & (ids != token)] if token is not None else ids[mask > 0]
    rows, pictures = (
        [],
        list(
            itertools.accumulate(
                [0, *(((ids == token).sum(1) // max(per_image, 1)).tolist() if token is not None else [0] * len(ids))]
            )
        ),
    )
    for i in range(len(ids)):
        rows.append((ids[i][mask[i] > 0], range(pictures[i], pictures[i + 1])))
    plans: list[list[tuple[int, int]]] = [
        [(0, 3)],  # (row, tokens of text to put behind it)
        [(len(rows) - 1, 0), (0, 5)],
        [(i % len(rows), 2 * i) for i in range(len(rows) + 2)],
    ]
    for plan in plans:
        made, chosen = [], []
        for row, more in plan:
            base, own = rows[row]
            picked = text[torch.randint(text.numel(), (more,), generator=generator)]
            made.append(torch.cat([base[:-1], picked, base[-1:]]))
            chosen += list(own)
        longest = max(len(r) for r in made)
        padded = torch.stack([torch.cat([r.new_zeros(longest - len(r)), r]) for r in made])
        alive = torch.stack([torch.cat([mask.new_zeros(longest - len(r)), mask.new_ones(len(r))]) for r in made])
        drawn = {"input_ids": padded, "attention_mask": alive}
        if pictures[-1]:
            batched = any(v.dim() == 5 for v in images.values())  # [B, pictures, ...] goes by rows
            for name, value in images.items():
                drawn[name] = value[[row for row, _ in plan]] if batched else value[chosen]
                if name == "pixel_values" and len(drawn[name]):
                    drawn[name] = drawn[name].flip(-1)
        yield f"batch {len(plan)}, length {longest}", drawn


# ------------------------------------------------------------------------------------------------------- worst node


def worst_node(lowered: Lowered, path: Path, feed: Mapping[str, Any], tolerance: float) -> str:
    """The first node whose value in onnxruntime is off from the same node in torch, with the source line.

    Args:
        feed: arrays for the inputs of the file.
    """
    import onnx
    import onnxruntime

    proto = onnx.load(str(path))
    made = {name for node in proto.graph.node for name in node.output if name}
    known = {o.name for o in proto.graph.output}
    values, order = _torch_values(lowered, feed)
    wanted = [n for n in order if n in made and n not in known and isinstance(values[n], Tensor)]
    types = {
        torch.float32: 1,
        torch.int64: 7,
        torch.bool: 9,
        torch.float16: 10,
        torch.float64: 11,
        torch.int32: 6,
        torch.bfloat16: 16,
    }
    wanted = [n for n in wanted if values[n].dtype in types]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, types[values[n].dtype], None) for n in wanted)
    probe = path.with_name(f"probe-{path.name}")
    try:
        onnx.save(proto, str(probe), save_as_external_data=True, location=f"{probe.name}_data")
        session = onnxruntime.InferenceSession(str(probe), providers=["CPUExecutionProvider"])
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feed)), strict=True))
    finally:
        for file in (probe, probe.with_name(f"{probe.name}_data")):
            file.unlink(missing_ok=True)
    worst, culprit = 0.0, ""
    for name in wanted:
        row = compare("", name, found[name], values[name].detach())
        if row.relative > max(tolerance / 10, 10 * worst):
            where = lowered.lines.get(name) or order[name]
            culprit = f"node {name}" + (f" [{where}]" if where else "") + f", relative error {row.relative:.1e}"
            if row.relative > tolerance:
                return culprit
            worst = row.relative
    return culprit or "no inner node that both sides have is off"


def _torch_values(lowered: Lowered, feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    from tokcompile.capture.graph import source_line

    program = lowered.program
    values: dict[str, Any] = {}
    lines: dict[str, str] = {}

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values[node.name] = super().run_node(node)
            lines[node.name] = source_line(node)
            return values[node.name]

    arguments = iter(
        [
            *(torch.from_numpy(np.array(feed[n])) for n in lowered.inputs),
            *(lowered.size_values({n: torch.from_numpy(np.array(v)) for n, v in feed.items()})),
        ]
    )
    state = {**program.state_dict, **program.constants}
    args = [state[s.target] if s.target is not None else next(arguments) for s in program.graph_signature.input_specs]
    with torch.no_grad():
        Record(program.graph_module).run(*args)
    return values, lines


def failed(rows: Sequence[Parity], tolerance: float) -> list[Parity]:
    return [row for row in rows if not row.passes(tolerance)]


def table(rows: Sequence[Parity]) -> str:
    """The rows as text."""
    head = ("inputs", "output", "shape", "max abs", "relative", "tokens")
    lines = [
        (
            r.inputs,
            r.output,
            "x".join(map(str, r.shape)),
            f"{r.max_abs:.1e}",
            f"{r.relative:.1e}",
            "" if r.tokens_equal is None else "equal" if r.tokens_equal else "DIFFER",
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)
    )


def raise_failed(rows: Sequence[Parity], tolerance: float, culprit: Callable[[], str]) -> None:
    """Raise when a row is above the tolerance."""
    bad = failed(rows, tolerance)
    if bad:
        worst = max(bad, key=lambda r: (r.relative, r.max_abs))
        raise ExportError(
            f"the exported files differ from the model: {worst.output} on inputs '{worst.inputs}' has relative error "
            f"{worst.relative:.1e} (tolerance {tolerance:.0e})"
            + (", and the tokens differ" if worst.tokens_equal is False else "")
            + f"; first node that is off: {culprit()}. Nothing was written.\n{table(rows)}"
        )
