"""Updates in place: every reader of a value runs before its memory is written, in whatever order nodes run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.errors import ExportError
from export import inplace, training
from export.bundle import export_bundle
from export.graph import Branch, Graph, Node, Port
from export.inplace import make_in_place, replaced
from export.models.shakespeare import char_gru

SHAPE = (3, 3)


def graph(nodes: list[Node], *values: str) -> Graph:
    """A step on square matrices, and the scalar input ``keep``."""
    inputs = [Port(f"param.{name}", SHAPE, "float32") for name in values]
    outputs = [Port(f"next.{name}", SHAPE, "float32") for name in values]
    made = [name for node in nodes for name in node.outputs if not name.startswith("next.")]
    shapes = dict.fromkeys([port.name for port in inputs] + made, SHAPE)
    shapes |= {"keep": (), "wanted": ()}
    read = {name for node in nodes for name in node.inputs}
    outputs += [Port(name, SHAPE, "float32") for name in made if name not in read and name != "wanted"]
    return Graph([*inputs, Port("keep", (), "float32")], outputs, nodes, {}, shapes)


def branch(*nodes: Node) -> Branch:
    return Branch(list(nodes), [Port(nodes[-1].outputs[0], SHAPE, "float32")])


UPDATE = Node("Sub", ["param.w", "y"], ["next.w"])
CASES = {
    "a later reader": ([Node("Mul", ["param.w", "keep"], ["y"]), UPDATE, Node("MatMul", ["param.w", "y"], ["z"])], "w"),
    "a reader under another name": (
        [
            Node("Mul", ["param.w", "keep"], ["y"]),
            Node("Identity", ["param.w"], ["same"]),
            UPDATE,
            Node("MatMul", ["same", "y"], ["z"]),
        ],
        "w",
    ),
    "a reader that needs the result": (
        [Node("Mul", ["param.w", "keep"], ["y"]), UPDATE, Node("MatMul", ["param.w", "next.w"], ["z"])],
        "w",
    ),
    "two that read each other": (
        [Node("Sub", ["param.w", "param.v"], ["next.w"]), Node("Sub", ["param.v", "param.w"], ["next.v"])],
        "wv",
    ),
    "two that change places": (
        [Node("Identity", ["param.v"], ["next.w"]), Node("Identity", ["param.w"], ["next.v"])],
        "wv",
    ),
    "a product of itself": ([Node("MatMul", ["param.w", "param.w"], ["next.w"])], "w"),
    "a transpose": ([Node("Transpose", ["param.w"], ["next.w"], {"perm": [1, 0]})], "w"),
    "a product added to itself": (
        [Node("MatMul", ["param.w", "param.w"], ["y"]), Node("Add", ["y", "param.w"], ["next.w"])],
        "w",
    ),
    "a gemm that adds": (
        [Node("Gemm", ["param.v", "param.v", "param.w"], ["next.w"]), Node("Neg", ["param.v"], ["next.v"])],
        "wv",
    ),
    "a choice of branches": (
        [
            Node("Mul", ["param.w", "keep"], ["y"]),
            Node("Equal", ["keep", "keep"], ["wanted"]),
            Node(
                "If",
                ["wanted"],
                ["next.w"],
                {},
                {
                    "then_branch": branch(Node("Gemm", ["y", "y", "param.w"], ["a"])),
                    "else_branch": branch(Node("MatMul", ["y", "param.w"], ["b"])),
                },
            ),
            Node("MatMul", ["param.w", "y"], ["z"]),
        ],
        "w",
    ),
}


def before(step: Graph, name: str) -> set[str]:
    """All values that ``name`` is computed from."""
    producers, found, left = step.producers(), set(), [name]
    while left:
        for inner in producers[left.pop()].nested():
            new = {source for source in inner.inputs if source in producers} - found
            found |= new
            left += new
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_priority", [False, True])
def test_results_are_the_same_in_one_memory(case: str, by_priority: bool) -> None:
    nodes, values = CASES[case]
    step = graph([Node(n.op, list(n.inputs), list(n.outputs), n.attributes, n.branches) for n in nodes], *values)
    make_in_place(step)
    session = runtime.session(step.to_model("step"), by_priority=by_priority)
    rng = np.random.default_rng(0)
    given = {f"param.{name}": rng.standard_normal(SHAPE, np.float32) for name in values}
    given["keep"] = np.array(0.5, np.float32)
    names = [value.name for value in session.get_outputs()]
    wanted = dict(zip(names, session.run(names, given), strict=True))
    memory = {name: value.copy() for name, value in given.items()}
    others = {name: np.zeros(SHAPE, np.float32) for name in names if not name.startswith("next.")}
    binding = session.io_binding()
    shared = {name: runtime.shared(array) for name, array in (memory | others).items()}
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, shared[value.name])
    pairs = replaced(names, list(memory))
    for name in names:
        binding.bind_ortvalue_output(name, shared[pairs.get(name, name)])
    runtime.run(session, binding)
    for name in names:
        np.testing.assert_array_equal((memory | others)[pairs.get(name, name)], wanted[name], err_msg=name)


def test_an_update_that_nothing_overtakes_is_left_alone() -> None:
    step = graph([Node("Mul", ["param.w", "keep"], ["y"]), Node("Sub", ["y", "param.w"], ["next.w"])], "w")
    make_in_place(step)
    assert [node.op for node in step.nodes] == ["Mul", "Sub"]


def test_an_export_whose_updates_are_not_ordered_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "make_in_place", backwards)
    with pytest.raises(ExportError, match=r"cannot update 'param\.[01]\.weight' in place"):
        export_bundle(
            nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), tmp_path / "m.fedge", name="m", inputs=[((5,), "float32")]
        )
    assert not (tmp_path / "m.fedge").exists()


def backwards(step: Graph) -> None:
    """Make every other reader of a weight wait for the weight's update."""
    after = next(node for node in step.nodes if node.outputs == ["next.1.weight"])
    reader = [node for node in step.nodes if "param.1.weight" in node.inputs and node.op in ("Gemm", "MatMul")][-1]
    assert reader is not after
    step.constants["none"] = np.zeros(2, np.int64)
    reader.inputs = ["overtaken" if name == "param.1.weight" else name for name in reader.inputs]
    step.nodes += [
        Node("Size", ["next.1.weight"], ["late"]),
        Node("Mul", ["none", "late"], ["shape"]),
        Node("Reshape", ["param.1.weight", "shape"], ["overtaken"]),
    ]
    inplace._sort(step)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_every_reader_of_a_weight_comes_before_its_update(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kept: list[Graph] = []
    made = training.make_in_place

    def keep(step: Graph) -> None:
        made(step)
        kept.append(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_in_place", keep)
        export_bundle(
            char_gru(vocabulary=5, hidden=8),
            tmp_path / "m.fedge",
            name="m",
            inputs=[((6,), "int64")],
            optimizer=optimizer,
        )
    (step,) = kept
    for new, old in replaced([port.name for port in step.outputs], [port.name for port in step.inputs]).items():
        writer = step.producers()[new]
        needed = before(step, new)
        for node in step.nodes:
            if any(old in inner.inputs for inner in node.nested()) and node is not writer:
                assert needed.intersection(node.outputs), f"{new} does not wait for {node.outputs[0]}"
    assert Bundle.open(tmp_path / "m.fedge").manifest.optimizer.name == optimizer
