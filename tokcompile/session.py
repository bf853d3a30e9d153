"""One optimized model's state: the recipe, the graphs compiled for it, and the report of what was done."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from tokcompile.canonical import canonicalise
from tokcompile.capture import ASSERTIONS, Captured, ancestors, extract, fold_constants, from_dynamo, propagate
from tokcompile.errors import NarrowError, NoMatchError, RecipeError, TokcompileError, UnprofitableError
from tokcompile.flops import graph_flops, node_flops
from tokcompile.lower import Guard, lower
from tokcompile.narrow import Cut, narrow
from tokcompile.plan import (
    Context,
    HostSize,
    Kept,
    Memory,
    MemoryInput,
    Pass,
    Seen,
    StateInput,
    layer_of,
    region_keys,
)
from tokcompile.recipes import Recipe, Step
from tokcompile.regions import find_regions
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import KINDS, Region, Regions
from tokcompile.registry import get_pass
from tokcompile.reporting import LayerTokens, Report, StageReport, StepReport, path_globs
from tokcompile.state import PreparedState
from tokcompile.token_axis import guarded_equal

aten = torch.ops.aten
LOGICAL = torch.ops.tokcompile.logical.default
#: Region kinds that are rewritten one by one, in place; a step for them can choose layers.
LOCAL = ("attention", "feed_forward", "moe")
FEATURE_SCORES = torch.ops.tokcompile.feature_scores.default


@dataclass
class KeptEntry:
    """What one cut of one prefill kept.

    Attributes:
        step: index of the recipe step. name: its pass.
        path: module path of the first layer below the cut. layer: its index in the stack.
        indices: int64 ``[B, K]``, positions in the unpruned sequence of this call, ascending; -1 pads ragged rows.
    """

    step: int
    name: str
    path: str
    layer: int
    indices: torch.Tensor


@dataclass
class ReusedEntry:
    """Whether one layer reused an earlier choice in one decode step.

    Attributes:
        step: index of the recipe step. name: its pass.
        path: module path of the region. layer: its index in the stack.
        rows: bool ``[B]``.
    """

    step: int
    name: str
    path: str
    layer: int
    rows: torch.Tensor


@dataclass
class Recording:
    """Collects :class:`KeptEntry` and :class:`ReusedEntry` objects, in the order in which cuts and layers ran."""

    kept: list[KeptEntry] = field(default_factory=list)
    reused: list[ReusedEntry] = field(default_factory=list)


class Memories:
    """Values that decode steps hand on, by the tensor that holds the keys of a layer (see :class:`plan.Memory`).

    They live as long as that tensor, and count as long as nobody else wrote to it. Tensors of inference mode do not
    tell; with these, values are kept only where every step makes a new tensor of keys.
    """

    def __init__(self) -> None:
        self._of: Any = WeakIdKeyDictionary()

    def get(self, keys: torch.Tensor) -> list[torch.Tensor] | None:
        version, values = self._of.get(keys, (None, None))
        return values if version == _version(keys) else None  # type: ignore[no-any-return]

    def put(self, keys: torch.Tensor, values: list[torch.Tensor], in_place: bool) -> None:
        if not (in_place and keys.is_inference()):
            self._of[keys] = _version(keys), values


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Variant:
    """One compiled form of a graph."""

    run: Callable[..., Any]
    guard: Guard
    sizes: list[HostSize]
    ragged: list[bool]
    kept: list[Kept]
    prologue: tuple[fx.GraphModule, list[int]] | None = None
    inputs: list[HostSize | StateInput | MemoryInput] = field(default_factory=list)
    prepared: PreparedState | None = None
    #: each with the number of the argument that holds the keys so far, and of the result that holds the grown ones
    memories: list[tuple[Memory, int, int | None]] = field(default_factory=list)
    remembered: Memories = field(default_factory=Memories)

    def __post_init__(self) -> None:
        self.forms = [_form(self._state(item)) for item in self.inputs if isinstance(item, StateInput)]

    def extra(self, args: Sequence[Any]) -> list[Any] | None:
        """What to append to ``args``: sizes and prepared state, and what the prologue computes from all of these.

        None when this variant was made for other sizes, for other (un)ragged rows, or for state of another form.
        """
        found = [size(args) for size in self.sizes]
        if [r for _, r in found] != self.ragged or any(
                size.static not in (None, n) for size, (n, _) in zip(self.sizes, found, strict=True)):
            return None
        numbers = {id(size): n for size, (n, _) in zip(self.sizes, found, strict=True)}
        values = {id(memory): self.remembered.get(args[past]) or memory.fresh(args[past])
                  for memory, past, _ in self.memories}
        more = [numbers[id(item)] if isinstance(item, HostSize) else self._state(item) if isinstance(item, StateInput)
                else values[id(item.memory)][item.place] for item in self.inputs]
        # Dynamo guards on the parameters that the model uses, and knows nothing of these
        if [_form(v) for v, item in zip(more, self.inputs, strict=True) if isinstance(item, StateInput)] != self.forms:
            return None
        if self.prologue is None:
            return more
        choose, inputs = self.prologue
        given = [*args, *more]
        with torch.no_grad():
            return [*more, *choose(*(given[i] for i in inputs))]

    def _state(self, item: StateInput) -> torch.Tensor:
        assert self.prepared is not None
        return getattr(self.prepared.scope(item.pass_name, item.key), item.name)  # type: ignore[no-any-return]


def _form(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


class Session:
    """See the module. One for each optimized model."""

    def __init__(self, recipe: Recipe | None, *, lowering: str = "inductor", on_no_match: str = "error",
                 model: str = "", state: PreparedState | None = None, observing: bool = False) -> None:
        """
        Args:
            state: what calibration prepared.
            observing: put the observers of the passes into the graphs instead of rewriting them.
        """
        self.recipe, self.lowering, self.on_no_match = recipe, lowering, on_no_match
        self.prepared, self.observing, self.counting = state, observing, True
        #: step -> region key -> what calibration saw there; and sums of an earlier run that was broken off
        self.seen: dict[int, dict[str, Seen]] = {}
        self.resumed: dict[tuple[int, str], dict[str, Any]] = {}
        self.passes: list[tuple[Step, Pass]] = []
        if recipe is not None:
            for step in recipe.steps:
                kind = get_pass(step.pass_)
                self.passes.append((step, kind(step.params)))
            _check_supported(recipe)
        self.stage = "forward"
        self.scored_features = False
        self.tracks_cache = False
        #: an encoder that runs ahead of the decoder hands on fewer tokens than it had
        self.pruned_encoder = False
        self.recordings: list[Recording] = []
        self.remembered = Memories()
        self.graphs: list[CompiledGraph] = []
        self.report = Report(model=model, recipe=recipe.name if recipe is not None else "")
        self.report.steps = [StepReport(pass_name=step.pass_, status="structure_miss", matches=0, regions=[],
                                        reason="no graph was captured yet") for step, _ in self.passes]
        self._checked: set[int] = set()
        self._covering: set[str] = set()  # globs of protect.paths that cover a region
        #: tensors of the dense model when it was optimized (see state.origin); and those that a saved model had lost
        self.origin: dict[str, tuple[int, torch.dtype]] = {}
        self.changed: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy starts without compiled graphs: they read the state of this session
        return _session, (self.recipe, self.lowering, self.on_no_match, self.report.model, self.prepared)

    # .. the torch.compile backend

    def backend(self, graph_module: fx.GraphModule, _inputs: Sequence[Any]) -> CompiledGraph:
        reason = getattr(graph_module, "compile_subgraph_reason", None)
        graph = CompiledGraph(self, graph_module, whole=not (reason is not None and reason.graph_break))
        self.graphs.append(graph)
        return graph

    @property
    def compilations(self) -> int:
        """How many graphs were lowered so far (each variant counts)."""
        return sum(len(g.variants) for g in self.graphs)

    def note_uncaptured(self, stage: str, error: BaseException) -> None:
        reason = " ".join(str(error).split("\n\n")[0].split())[:500]
        self.report.stages.append(StageReport(name=stage, captured=False, reason=f"{type(error).__name__}: {reason}"))

    @contextlib.contextmanager
    def at_stage(self, name: str) -> Iterator[None]:
        previous, self.stage = self.stage, name
        try:
            yield
        finally:
            self.stage = previous

    # .. matching

    def rewrite(self, ctx: Context, stage: str) -> None:
        """Apply the recipe to one graph and note in the report what happened."""
        canonicalise(ctx.captured)
        _narrow_pruned_cache(ctx.captured)
        ctx.regions = find_regions(ctx.captured.graph)
        ctx.places = {key: layer_of(ctx.regions, region) for region, key in region_keys(ctx.regions).items()}
        ctx.streams = [[s.layers[0].input, *(layer.output for layer in s.layers)] for s in ctx.regions.stacks
                       if s.layers]
        protect = self.recipe.protect if self.recipe is not None else None
        if protect is not None:
            ctx.leading_tokens = protect.leading_tokens
            self._covering.update(*(protect.covering(region.path) for region in ctx.regions.regions))
        before = graph_flops(ctx.captured.graph)
        self._note_regions(ctx.regions, stage)
        if self.pruned_encoder and stage != "encoder":
            _check_readers(ctx)
        layers = LayerTokens(ctx.regions, stage)
        for node in ctx.captured.graph.find_nodes(op="call_function", target=FEATURE_SCORES):
            self._score_features(ctx, node)
        changed: list[StepReport] = []
        for index, (step, method) in enumerate(self.passes):
            ctx.step = index
            if changed and step.region in LOCAL:
                ctx.regions = find_regions(ctx.captured.graph)  # earlier steps moved what these regions are made of
            if self._apply(ctx, step, method, self.report.steps[index], stage):
                changed.append(self.report.steps[index])
        after = graph_flops(ctx.captured.graph)
        for entry in changed:
            entry.flop_ratio = before / max(after, 1)
        if not any(layer["stage"] == stage for layer in self.report.layers):
            self.report.layers += layers.after()

    @property
    def wants_scores(self) -> bool:
        """Whether a pass scores image features inside the image encoder."""
        return any(method.scores_features for _, method in self.passes)

    def _score_features(self, ctx: Context, marker: fx.Node) -> None:
        for index, (_, method) in enumerate(self.passes):
            if not method.scores_features:
                continue
            try:
                scores = method.score_features(ctx, marker.args[0])  # type: ignore[arg-type]
            except NarrowError as error:
                self.report.steps[index].status, self.report.steps[index].reason = "condition_failed", str(error)
                continue
            marker.replace_all_uses_with(scores)
            self.scored_features = True

    def _candidates(self, ctx: Context, step: Step) -> list[Region]:
        """The regions that a step is for.

        Raises:
            RecipeError: ``target.layers`` asks for a layer that no stack has.
        """
        protect = self.recipe.protect if self.recipe else None
        found, outside = [], None
        for region in ctx.regions.of(step.region):
            if not step.target.matches_path(region.path) or (protect and protect.covers(region.path)):
                continue
            if step.target.modality not in (None, region.variant.get("modality")):
                continue
            if step.target.layers is not None:
                place = ctx.layer(region)
                try:
                    if place is None or place[0] not in step.target.layer_indices(place[1]):
                        continue
                except RecipeError as error:
                    outside = error  # another stack of the model may be deeper
                    continue
            found.append(region)
        if outside is not None and not found:
            raise RecipeError(f"steps[{ctx.step}] ({step.pass_}): {outside}")
        return found

    def _apply(self, ctx: Context, step: Step, method: Pass, entry: StepReport, stage: str) -> bool:
        """Apply one step (or observe for it), note what came of it; whether the graph was changed."""
        if (self.observing and method.calibration == "none") or (stage == "decode" and method.stage == "prefill"):
            return False
        problems: list[tuple[str, NarrowError]] = []  # with the path of the region; several can have one
        done: list[Region] = []
        details: dict[str, dict[str, Any]] = {}
        for region in self._candidates(ctx, step):
            try:
                if self.observing:
                    seen = self._seen(ctx, region)
                    method.observe(ctx, region, seen)
                    self.seen.setdefault(ctx.step, {})[seen.key] = seen
                else:
                    details[region.path] = method.apply(ctx, region)
                done.append(region)
            except NarrowError as error:
                problems.append((region.path, error))
                if self.observing:
                    self._forget(ctx, region)
        reasons = list(dict.fromkeys(str(p) for _, p in problems))
        if entry.status == "matched":
            later = self._no_longer(step, method, entry, stage, problems)
            entry.reason = "; ".join(filter(None, (entry.reason, *later)))
        elif done:
            entry.status, entry.reason = "matched", "; ".join(reasons)
        elif problems:
            unprofitable = all(isinstance(p, UnprofitableError) for _, p in problems)
            entry.status, entry.reason = "unprofitable" if unprofitable else "condition_failed", reasons[0]
        elif entry.status == "structure_miss":
            entry.reason = self._miss(ctx.regions, step.region, stage, step)
        if done:
            entry.matches = max(entry.matches, len(done))
            entry.regions = sorted({*entry.regions, *(r.path for r in done)})
            entry.details.update(_merged(details))
        return bool(done) and not self.observing

    def _no_longer(self, step: Step, method: Pass, entry: StepReport, stage: str,
                   problems: Sequence[tuple[str, NarrowError]]) -> list[str]:
        """Regions that were changed in one graph and stay as they are in another; warns of each once."""
        if method.stage == "decode" and stage != "decode":
            return []
        texts = dict.fromkeys(f"not in another {stage} graph of '{path}': {error}" for path, error in problems
                              if path in entry.regions and not isinstance(error, UnprofitableError))
        found = [text for text in texts if text not in entry.reason]
        if found and self.on_no_match != "ignore":
            warnings.warn(f"step '{step.pass_}': " + "; ".join(found), stacklevel=2)
        return found

    def _seen(self, ctx: Context, region: Region) -> Seen:
        """What calibration has seen of ``region``; noted only once the pass takes the region."""
        key = ctx.key(region)
        seen = self.seen.get(ctx.step, {}).get(key)
        if seen is None:
            layer, depth = ctx.layer(region) or (None, None)
            seen = Seen(key, region.path, layer, depth, sums=self.resumed.pop((ctx.step, key), {}))
        return seen

    def _forget(self, ctx: Context, region: Region) -> None:
        """A region that was refused before anything was noted of it was not seen."""
        regions, key = self.seen.get(ctx.step, {}), ctx.key(region)
        seen = regions.get(key)
        if seen is not None and not (seen.sums or seen.weights or seen.facts):
            del regions[key]

    def _miss(self, regions: Regions, kind: str, stage: str, step: Step) -> str:
        found = ", ".join(f"{len(regions.of(k))} {k}" for k in KINDS if regions.of(k)) or "no region"
        near = regions.nearest_miss(kind)
        text = f"no {kind} in the {stage} graph (found {found})"
        if regions.of(kind):
            where = ", ".join(path_globs(region.path or "(model)" for region in regions.of(kind)))
            text = f"{len(regions.of(kind))} {kind} found ({where}), none fits the step's target filters"
            if self.recipe is not None and self.recipe.protect is not None and self.recipe.protect.paths:
                text += " and is outside of protect.paths"
        if near is not None:
            place = ", ".join(p for p in (near.path, near.source) if p)
            text += f"; nearest miss: {near.reason} [node {near.node.name}{', ' + place if place else ''}]"
        elif others := [k for k in get_pass(step.pass_).also if step.target.region is None and regions.of(k)]:
            text += f"; say target: {{region: {others[0]}}} to act there"
        elif kind == "merge_point":
            text += "; call with an image (pixel_values), or use a recipe for models without images"
        return text

    def _note_regions(self, regions: Regions, stage: str) -> None:
        fresh = Report.from_regions(regions)
        for item in fresh.regions:
            item["stage"] = stage
        if not any(r.get("stage") == stage for r in self.report.regions):
            self.report.regions += fresh.regions
            self.report.near_misses += fresh.near_misses

    def check_matches(self, stage: str | None) -> None:
        """Raise or warn, once for each step, when a step of the recipe changed nothing (or less than it expects).

        Args:
            stage: the stage that was just compiled, or None after a whole call: then steps that had no decode step to
                act on are not judged.
        """
        if self.recipe is None or self.observing:
            return
        problems, judged = self._unprotected(stage), []
        decoded = any(s.name == "decode" for s in self.report.stages)
        for index, ((step, method), entry) in enumerate(zip(self.passes, self.report.steps, strict=True)):
            due = (stage == "decode" or decoded) if method.stage == "decode" else stage != "encoder"
            if index in self._checked or not due or (stage == "decode" and method.stage != "decode"):
                continue
            judged.append(index)
            least, most = step.expect.min_matches, step.expect.max_matches
            if entry.matches < least and entry.status != "unprofitable":
                problems.append(f"step '{step.pass_}' changed {entry.matches} region(s), expected at least "
                                f"{least}: {entry.reason}")
            elif most is not None and entry.matches > most:
                problems.append(f"step '{step.pass_}' changed {entry.matches} regions, expected at most {most}")
        self.report.problems += [problem for problem in problems if problem not in self.report.problems]
        if problems and self.on_no_match == "error":
            stages = "; ".join(f"stage '{s.name}' was not captured: {s.reason}" for s in self.report.stages
                               if not s.captured)
            text = "\n".join(problems) + (f"\n{stages}" if stages else "")
            raise NoMatchError(text + "\nPass on_no_match='warn' or 'ignore' to run the model unchanged.")
        self._checked.update(judged)
        if problems and self.on_no_match == "warn":
            warnings.warn("\n".join(problems), stacklevel=3)


    def _unprotected(self, stage: str | None) -> list[str]:
        """What is wrong with ``protect.paths``, once what there is to protect has been seen."""
        protect = self.recipe.protect if self.recipe else None
        if protect is None or stage == "encoder" or not all(s.captured for s in self.report.stages):
            return []
        known = path_globs(dict.fromkeys(region["path"] for region in self.report.regions if region["path"]))
        return [f"protect.paths: {glob!r} covers no region (there are {', '.join(known) or 'none'})"
                for glob in protect.paths if glob not in self._covering]


def _session(recipe: Recipe | None, lowering: str, on_no_match: str, model: str,
             state: PreparedState | None) -> Session:
    return Session(recipe, lowering=lowering, on_no_match=on_no_match, model=model, state=state)


def _merged(details: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the pass said of each region: once where all regions agree, else by module path."""
    names = dict.fromkeys(name for item in details.values() for name in item)
    merged: dict[str, Any] = {}
    for name in names:
        values = {path: item[name] for path, item in details.items() if name in item}
        same = all(v == next(iter(values.values())) for v in values.values())
        merged[name] = next(iter(values.values())) if same else values
    return merged


def _check_supported(recipe: Recipe) -> None:
    """Refuse what a recipe may say and no pass of this version acts on: nothing is ignored silently."""
    problems = []
    for number, step in enumerate(recipe.steps):
        where, method = f"steps[{number}] ({step.pass_})", get_pass(step.pass_)
        if step.region not in (method.regions, *method.also):
            known = " or ".join((method.regions, *method.also))
            problems.append(f"{where}: works on {known}, not on {step.region}; leave target.region out")
        if step.target.layers is not None and method.regions not in LOCAL:
            problems.append(f"{where}: takes no target.layers; its own parameters say at which depth it acts")
        if step.target.modality is not None and method.regions != "merge_point":
            problems.append(f"{where}: images and video are told apart at merge points only; leave target.modality out")
    if recipe.protect is not None and recipe.protect.leading_tokens is not None and not any(
            get_pass(step.pass_).protects_leading for step in recipe.steps):
        problems.append("protect.leading_tokens: no pass of this recipe removes tokens inside an encoder; "
                        "leave it out")
    if problems:
        raise RecipeError("\n".join(problems))


def _check_readers(ctx: Context) -> None:
    """Refuse a decoder that counts the tokens of a pruned encoder: it cannot know which ones are left.

    Raises:
        TokcompileError: a cross attention has a mask over them, or its weights are given back.
    """
    flow = Flow(ctx.captured.graph)
    results = {flow.canonical(node) for node in ctx.captured.graph.output_node().all_input_nodes}
    for region in ctx.regions.of("attention"):
        if region.variant["cross"] != "cross":
            continue
        reason = "", ""
        if "mask" in region.roles:
            reason = "masks", "leave the encoder's attention_mask out, or call forward without encoder_outputs"
        elif region.roles.get("softmax") in results:
            reason = "gives back the weights of", "leave output_attentions and token timestamps out"
        if reason[0]:
            raise TokcompileError(f"cross attention '{region.path}' [{region.source}] {reason[0]} the tokens of an "
                                  f"encoder that ran before it and lost some of them; {reason[1]}")


def hoist(captured: Captured, indices: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[int]] | None:
    """Move the choice of tokens in front of the graph where it needs none of the model's layers.

    The choice is a few dozen small operations (sorts, scans, a greedy loop) that Inductor turns into kernels of their
    own: a first call took 1.57 times the CPU seconds of plain torch.compile with them in the graph (4 layers), and 1.11
    times without (8 layers).

    Returns:
        What computes the hoisted nodes, and from which placeholders; None when nothing is hoisted.
    """
    cheap = [n for n in dict.fromkeys(indices) if not any(node_flops(a) for a in ancestors([n]))]
    if not cheap:
        return None
    prologue, inputs = extract(captured, cheap)
    last = captured.placeholders[-1]
    for node in cheap:
        with captured.graph.inserting_after(last):
            last = captured.graph.placeholder(f"hoisted_{node.name}")
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last)
    return prologue, inputs


def _narrow_pruned_cache(captured: Captured) -> None:
    """Replace the marked keys and values of pruned cache layers by what the layers really hold."""
    cuts: list[Cut] = []
    sizes: dict[fx.Node, fx.Node] = {}
    for node in list(captured.graph.nodes):
        if node.target is not LOGICAL:
            continue
        states, held, _length, ragged = node.args
        if held not in sizes:
            with captured.graph.inserting_before(node):
                sizes[held] = captured.graph.call_function(aten.sym_size.int, (states, 2))
            sizes[held].meta["val"] = states.meta["val"].shape[2]
        # keys and values hold the same entries, though Dynamo may give the length of each a symbol of its own
        same = guarded_equal(states.meta["val"].shape[2], sizes[held].meta["val"])  # tells the symbols so
        assert same
        cuts.append(Cut(node, held, sizes[held], ragged=ragged, token_dim=2, narrowed=states))
    if cuts:
        narrow(captured, cuts)
        for cut in cuts:
            if not cut.node.users:
                captured.graph.erase_node(cut.node)
        captured.graph_module.recompile()


class CompiledGraph:
    """What the backend gives Dynamo for one graph: compiles at the first call, and again where sizes differ in kind."""

    def __init__(self, session: Session, graph_module: fx.GraphModule, whole: bool) -> None:
        self.session, self.graph_module, self.whole = session, graph_module, whole
        self.stage = session.stage
        self.variants: list[Variant] = []

    def __call__(self, *args: Any) -> Any:
        for variant in self.variants:
            extra = variant.extra(args)
            if extra is not None and variant.guard([*args, *extra]):
                return self._run(variant, args, extra)
        variant = self._compile(args)
        extra = variant.extra(args)
        assert extra is not None
        return self._run(variant, args, extra)

    def _run(self, variant: Variant, args: Sequence[Any], extra: list[int]) -> Any:
        results = variant.run(*args, *extra)
        if not variant.kept and not variant.memories:
            return results
        count = len(variant.kept)
        own = len(results) - count - sum(len(memory.outputs) + 1 for memory, _, _ in variant.memories)
        results, kept, handed = results[:own], results[own: own + count], list(results[own + count:])
        for memory, past, grown in variant.memories:
            values, reused = handed[:len(memory.outputs)], handed[len(memory.outputs)]
            handed = handed[len(memory.outputs) + 1:]
            self.session.remembered.put(args[past] if grown is None else results[grown], values, grown is None)
            for recording in self.session.recordings:
                name = self.session.passes[memory.step][0].pass_
                recording.reused.append(ReusedEntry(memory.step, name, memory.path, memory.layer, reused))
        for recording in self.session.recordings:
            for item, indices in zip(variant.kept, kept, strict=True):
                name = self.session.passes[item.step][0].pass_
                recording.kept.append(KeptEntry(item.step, name, item.path, item.layer, indices.detach().clone()))
        return results

    def _compile(self, args: Sequence[Any]) -> Variant:
        session = self.session
        started = time.perf_counter()
        captured = from_dynamo(self.graph_module, args)
        # the first compilation of a graph of static sizes is static throughout, as torch.compile does it
        ctx = Context(captured, Regions(), args, whole=self.whole, static=not captured.symbols and not self.variants,
                      prepared=session.prepared, counting=lambda: session.counting, memories=[])
        session.rewrite(ctx, self.stage)
        if ctx.kept:
            session.pruned_encoder |= self.stage == "encoder"
        output = next(iter(captured.graph.find_nodes(op="output")))
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        memories = [(m, captured.placeholders.index(m.past), None if m.grown is None else results.index(m.grown))
                    for m in ctx.memories or ()]
        handed = [n for m, _, _ in memories for n in (*m.outputs, m.reused)]
        if ctx.kept or handed:
            output.args = ((*results, *(k.node for k in ctx.kept), *handed),)
        inputs = [ctx.inputs[node] for node in captured.placeholders[len(args):]]
        prologue = hoist(captured, ctx.indices)
        captured.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.is_impure() and n.target not in (aten.item.default, *ASSERTIONS))
        captured.graph_module.recompile()
        session.check_matches(self.stage)
        if not session.observing:
            fold_constants(captured)
        if session.lowering == "eager":
            propagate(captured)  # Inductor traces the graph anyway, and so derives every shape
        run, compiled = lower(captured, session.lowering, ctx.streams)
        variant = Variant(run, Guard(captured), ctx.sizes, ctx.ragged, ctx.kept, prologue, inputs, session.prepared,
                          memories, session.remembered)
        self.variants.append(variant)
        session.report.stages.append(StageReport(
            name=self.stage, captured=True, nodes=len(captured.graph.nodes), compiled=compiled,
            seconds=time.perf_counter() - started))
        return variant

