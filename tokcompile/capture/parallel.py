"""Tensor parallelism: a graph over sharded weights (DTensor) becomes the graph of one rank, over plain tensors.

What a parallel layer does around its operation (hand the input out, add up or join what the ranks made) becomes a
part of the operation, so that one layer is one node, as in a model that is not sharded::

    linear(x, w[:, part]) -> all_reduce [-> + bias]          linear(x, w, bias)     "reduce"
    linear(x, w[part]) -> all_gather                  ->     linear(x, w, bias)     "gather"
    embedding(ids of own rows) -> all_reduce                 embedding(w, ids)      "lookup"
    linear(x, w[part])                                       linear(x, w[part])     stays: the ranks differ behind it

The weight's placeholder says what its operation does beyond that of a plain weight (``meta["parallel"]``), and
``lower.parallel`` writes it out again, when everything else is done. In between a weight has the shape that fits the
values on one rank, and ``meta["local"]`` is the one that it is called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.known_trace import UntraceableError

_LINEAR, _EMBEDDING = {F.linear, torch.ops.aten.linear.default}, {F.embedding, torch.ops.aten.embedding.default}


@dataclass(frozen=True)
class Role:
    """What ``operation`` does on a weight: ``kind`` is "reduce", "split_reduce", "gather", "lookup", "lookup_gather"
    or "local".

    Attributes:
        group: name of the process group. ranks: their number. rank: this one's.
        start: number of the first row of the weight that is on this rank.
    """

    operation: str
    kind: str
    group: str = ""
    ranks: int = 1
    rank: int = 0
    start: int = 0


@dataclass
class _Held:
    """What stands for a value of the captured graph that is no plain tensor, or was made from a shard.

    Attributes:
        node: its local value in the new graph. weight: the placeholder of the sharded weight, where it is one.
        split: the input that it is a part of was whole.
    """

    node: fx.Node
    weight: fx.Node | None = None
    distributed: bool = False
    split: bool = False


def is_sharded(value: Any) -> bool:
    """Whether a tensor is spread over ranks."""
    return isinstance(value, Tensor) and type(value).__name__ == "DTensor" and hasattr(value, "placements")


def process_group(graph: fx.Graph) -> str:
    """Name of the group of ranks that share the weights of a graph ("" where none are shared)."""
    return next((n.meta["group"] for n in graph.find_nodes(op="placeholder") if "group" in n.meta), "")


def part_of(node: fx.Node) -> fx.Node | None:
    """A layer that each rank has a part of, and whose result reaches ``node`` before anything adds or joins the parts.

    What is computed from it differs from rank to rank.
    """
    seen, todo = {node}, [node]
    while todo:
        found = todo.pop()
        if str(found.target).startswith("_c10d_functional.all_"):
            continue
        sources = found.all_input_nodes
        if any(n.meta.get("parallel") for n in sources):
            continue  # added up or joined
        if any(n.meta.get("parts") for n in sources):
            return found
        new = [n for n in sources if n not in seen]
        seen.update(new)
        todo += new
    return None


def one_rank(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, dict[str, Any]]]:
    """The graph of this rank, and for each of its inputs what is to be noted there (target -> ``meta``).

    Raises:
        UntraceableError: the graph does something else with sharded values, or gradients are asked for.
    """
    given = graph_module.graph.find_nodes(op="placeholder")
    examples = [node.meta.get("example_value") for node in given]
    if not any(is_sharded(example) for example in examples):
        return graph_module, {}
    if torch.is_grad_enabled() and any(is_sharded(example) and example.requires_grad for example in examples):
        raise UntraceableError(
            "weights are sharded (DTensor) and gradients are on: models of tensor parallelism are run, not trained; "
            "call the model under torch.no_grad()"
        )
    fold = _Fold(graph_module)
    return fold.run(), fold.notes


class _Fold:
    """One pass over a graph of Dynamo, see the module."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module, self.graph = graph_module, fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.held: dict[fx.Node, _Held] = {}
        #: operation on a weight -> that weight; old node -> what it is in the new graph
        self.calls: dict[fx.Node, fx.Node] = {}
        self.sharded: dict[fx.Node, Tensor] = {}
        self.roles: dict[fx.Node, dict[str, Role]] = {}
        self.notes: dict[str, dict[str, Any]] = {}

    def run(self) -> fx.GraphModule:
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "output":
                self._plain(node)
                self.graph.output(fx.map_arg(node.args[0], self.new.__getitem__))
            else:
                self._node(node)
        for call, weight in self.calls.items():
            operation = _operation(call)
            if operation not in self.roles.get(weight, {}):
                self._play(call, weight, "local")
        for weight in self.sharded:
            self._note(weight)
        return fx.GraphModule(self.graph_module, self.graph)

    # .. nodes

    def _input(self, node: fx.Node) -> None:
        example = node.meta.get("example_value")
        new = self.new[node] = self.graph.node_copy(node)
        if is_sharded(example):
            if example.device_mesh.ndim != 1:  # type: ignore[union-attr]
                raise self._refuse(node, "is sharded over a mesh of several dimensions")
            assert example is not None
            self.sharded[new] = example
            self.held[node] = _Held(new, weight=new, distributed=True)
        elif not isinstance(example, Tensor | torch.SymInt | int | float | bool):
            new.meta["example_value"] = 0  # a mesh: what used it is gone
            self.notes[str(node.target)] = {"unused": True}

    def _node(self, node: fx.Node) -> None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        held = self.held.get(first) if first is not None else None
        if name == "from_local" and is_sharded(node.meta.get("example_value")):
            self._plain(node)
            assert first is not None
            value = self.new[first]
            self.held[node] = _Held(value, weight=self.calls.get(value), distributed=True)
        elif held is not None and held.distributed and name == "redistribute":
            assert first is not None
            self.held[node] = self._redistribute(node, first, held)
        elif held is not None and held.distributed and name == "to_local":
            assert first is not None
            self._to_local(node, first, held)
        elif not (node.target in _LINEAR | _EMBEDDING and self._on_weight(node)) and not self._sum(node, name, first):
            self._plain(node)
            self.new[node] = self.graph.node_copy(node, self.new.__getitem__)

    def _plain(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in self.held and self.held[source].distributed:
                raise self._refuse(node, f"is computed from a sharded value ({source.name}) as a whole")

    def _to_local(self, node: fx.Node, first: fx.Node, held: _Held) -> None:
        self.new[node] = held.node
        if held.weight is held.node:  # a weight itself
            self.held[node] = _Held(held.node, weight=held.node)
        elif any(p.is_partial() for p in _placements(first)):
            raise self._refuse(node, "takes sums of one rank that are not added up")
        elif held.split and held.node not in self.calls:
            raise self._refuse(node, "hands a part of a value out to each rank")

    def _on_weight(self, node: fx.Node) -> bool:
        """``linear`` or ``embedding`` with a sharded weight, whole or this rank's part of it."""
        place = 0 if node.target is torch.ops.aten.embedding.default else 1
        held = self.held.get(node.args[place])  # type: ignore[arg-type]
        if held is None or held.weight is None or held.weight is not held.node:
            return False
        x = self.held.get(node.args[1 - place])  # type: ignore[arg-type]
        whole = is_sharded(node.meta.get("example_value"))
        if whole and (x is None or not x.distributed):
            raise self._refuse(node, "mixes sharded values with plain ones")

        def value(old: fx.Node) -> fx.Node:
            return self.held[old].node if old in self.held else self.new[old]

        new = self.graph.node_copy(node, value)
        self.calls[new] = held.weight
        if whole:
            self.held[node] = _Held(new, weight=held.weight, distributed=True, split=x is not None and x.split)
            if x is not None and x.split and not _on_dim(self.sharded[held.weight], 1):
                raise self._refuse(node, "takes a part of its input on each rank")
        else:
            self.new[node] = new
        return True

    # .. what goes over the network

    def _redistribute(self, node: fx.Node, first: fx.Node, held: _Held) -> _Held:
        before, after = _placements(first), _placements(node)
        if before == after:
            return held
        if held.weight is held.node:
            raise self._refuse(node, "joins a sharded weight")
        (old,), (new,) = before, after
        last = node.meta["example_value"].dim() - 1
        call = held.node if held.node in self.calls else None
        if call is None and old.is_replicate() and new.is_shard(last):
            return _Held(held.node, distributed=True, split=True)
        weight = self.calls.get(held.node)
        if call is not None and weight is not None and new.is_replicate():
            row, column = _on_dim(self.sharded[weight], 0), _on_dim(self.sharded[weight], 1)
            if _operation(call) == "linear":
                if old.is_partial() and column:
                    self._play(call, weight, "split_reduce" if held.split else "reduce")
                    return held
                if old.is_shard(last) and row:
                    self._play(call, weight, "gather")
                    return held
            elif (old.is_partial() and row) or (old.is_shard(last) and column):
                self._play(call, weight, "lookup" if row else "lookup_gather")
                return held
        raise self._refuse(node, f"moves a value between ranks ({old} to {new})")

    def _sum(self, node: fx.Node, name: str, first: fx.Node | None) -> bool:
        """``all_reduce`` of what a linear layer made of one rank's columns, the wait for it, and the copy back."""
        call = self.new.get(first) if first is not None else None
        if first is None or call is None or call not in self.calls:
            return False
        if "wait_tensor" in str(node.target) or (name == "copy_" and self.new.get(node.all_input_nodes[-1]) is call):
            self.new[node] = call
            return True
        weight = self.calls[call]
        if not str(node.target).startswith("_c10d_functional.all_reduce") or not _on_dim(self.sharded[weight], 1):
            return False
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        writes = [n for n in first.users if n.target == "copy_" and n.args[0] is first]
        early = [n for n in first.users if n is not node and (not writes or order[n] < order[writes[0]])]
        if early or node.args[1] != "sum":
            raise self._refuse(node, "adds up a value that is used without the others' part, too")
        self._play(call, weight, "reduce", str(node.args[2]))
        self.new[node] = call
        return True

    # .. roles

    def _play(self, call: fx.Node, weight: fx.Node, kind: str, group: str = "") -> None:
        example = self.sharded[weight]
        mesh = example.device_mesh  # type: ignore[attr-defined]
        ranks, rank = mesh.size(), mesh.get_local_rank()
        start = 0
        if kind == "lookup":
            from torch.distributed.tensor import Shard

            start = Shard.local_shard_size_and_offset(example.shape[0], ranks, rank)[1]
        if kind in ("gather", "lookup_gather") and example.shape[0 if kind == "gather" else 1] % ranks:
            raise self._refuse(call, f"joins shards of different size over {ranks} ranks")
        group = group or mesh.get_group().group_name
        role = Role(_operation(call), kind, group, ranks, rank, int(start))
        if self.roles.setdefault(weight, {}).setdefault(role.operation, role) != role:
            raise self._refuse(call, "shares its weight with a layer that divides it in another way")

    def _note(self, weight: fx.Node) -> None:
        example = self.sharded[weight]
        local = example._local_tensor  # type: ignore[attr-defined]
        roles = self.roles.get(weight, {})
        whole = {role.kind not in ("reduce", "local") for role in roles.values()}
        if len(whole) > 1:
            raise self._refuse(weight, "is whole in one layer and divided in another")
        fake = local.new_empty(example.shape) if True in whole else local
        weight.meta["example_value"] = fake.detach().requires_grad_(example.requires_grad)
        parts = any(role.kind == "local" for role in roles.values()) and _on_dim(example, 0)
        self.notes[str(weight.target)] = {
            "parallel": {r.operation: r for r in roles.values() if r.kind != "local"},
            "group": example.device_mesh.get_group().group_name,  # type: ignore[attr-defined]
            "sharded": tuple(local.shape),
            "parts": parts or not roles,
        }

    def _refuse(self, node: fx.Node, what: str) -> UntraceableError:
        place = ", ".join(part for part in (module_path(node), source_line(node)) if part)
        return UntraceableError(
            f"weights are sharded (class DTensor), and {node.name} {what}, which cannot be followed"
            + (f" [{place}]" if place else "")
            + "; layers divided by columns and by rows of their weights can, one behind the other"
        )


def _operation(call: fx.Node) -> str:
    return "linear" if call.target in _LINEAR else "embedding"


def _placements(node: fx.Node) -> Sequence[Any]:
    return tuple(node.meta["example_value"].placements)


def _on_dim(weight: Tensor, dim: int) -> bool:
    (placement,) = weight.placements  # type: ignore[attr-defined]
    return bool(placement.is_shard(dim) or placement.is_shard(dim - weight.dim()))
