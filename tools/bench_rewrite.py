"""Times load + replace every Relu + save against onnx-ir and onnx-graphsurgeon.

    N nodes, half of them Relu  --each contender, in a process of its own-->  CPU s, peak MB
    3 GB of weights outside     --the same-->                                 CPU s, bytes read

Every contender writes `Where(Greater(Sub(x, jump), 0), x, 0)` at each site, with one jump and one
zero for all. jr_onnx also finds out the element type at each site, checks its result with
onnx.checker, undoes it and compares the bytes; the others take float32 for granted, and check
nothing.

Examples:
    python tools/bench_rewrite.py scaling
    python tools/bench_rewrite.py external
    python tools/bench_rewrite.py profile --nodes 50000
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

# Only the workers import the libraries: a child inherits the peak memory of its parent.

JUMP = 0.3
SIZES = (1_000, 10_000, 50_000, 100_000)
# graphsurgeon is left out of larger models, for the time it takes.
LARGEST_FOR_GRAPHSURGEON = 50_000
# What `onnx.load` and graphsurgeon's default need for the model with external data.
GIGABYTES_NEEDED = 12
LAYERS, WIDTH = 12, 8192  # 12 float32 matrices of 8192 x 8192: 3.2 GB

Rewrite = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Run:
    """What one process measured.

    Attributes:
        cpu: seconds of CPU time for load + replace + save.
        wall: seconds on the clock.
        peak: most megabytes resident, the imports included.
        read: bytes that the process read, the model file itself not counted.
        phases: CPU seconds of the parts of jr_onnx.
        nodes: how many nodes of each operator the result has.
    """

    cpu: float
    wall: float
    peak: float
    read: int
    phases: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)


def use_jr_onnx() -> Rewrite:
    """Everything that `jr-onnx retrofit` does, at the library level."""
    import jr_onnx

    def rewrite(source: Path, goal: Path) -> None:
        model = jr_onnx.load(source)
        done = jr_onnx.retrofit(model, jump=JUMP, form="sub-greater-where")
        jr_onnx.save(done.model, goal)

    return rewrite


def use_onnx_ir() -> Rewrite:
    """onnx-ir with its own `replace_nodes_and_values`, which keeps the names of values."""
    import numpy as np
    import onnx_ir as ir

    def constant(name: str, number: float) -> ir.Value:
        tensor = ir.tensor(np.array(number, np.float32))
        kind = ir.TensorType(ir.DataType.FLOAT)
        return ir.Value(name=name, shape=ir.Shape(()), type=kind, const_value=tensor)

    def rewrite(source: Path, goal: Path) -> None:
        model = ir.load(source)
        graph = model.graph
        jump, zero = constant("jump", JUMP), constant("zero", 0.0)
        graph.register_initializer(jump)
        graph.register_initializer(zero)
        for node in graph:
            if node.op_type != "Relu":
                continue
            x, y = node.inputs[0], node.outputs[0]
            sub = ir.Node("", "Sub", [x, jump])
            greater = ir.Node("", "Greater", [sub.outputs[0], zero])
            where = ir.Node("", "Where", [greater.outputs[0], x, zero])
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [sub, greater, where], [y], [where.outputs[0]]
            )
        ir.save(model, goal)

    return rewrite


def use_graphsurgeon(*, weights: bool = False) -> Rewrite:
    """graphsurgeon with one new list of nodes: no `layer`, `toposort` or `cleanup`.

    Args:
        weights: load external weights as `onnx.load` does by default; if not, they stay outside.
    """
    import numpy as np
    import onnx
    import onnx_graphsurgeon as gs

    def rewrite(source: Path, goal: Path) -> None:
        graph = gs.import_onnx(onnx.load(source, load_external_data=weights))
        jump = gs.Constant("jump", np.array(JUMP, np.float32))
        zero = gs.Constant("zero", np.array(0, np.float32))
        nodes = []
        for node in graph.nodes:
            if node.op != "Relu":
                nodes.append(node)
                continue
            x, y = node.inputs[0], node.outputs[0]
            node.inputs.clear()
            node.outputs.clear()
            difference, mask = gs.Variable(f"{y.name}/sub:0"), gs.Variable(f"{y.name}/greater:0")
            nodes += [
                gs.Node("Sub", f"{y.name}/sub", inputs=[x, jump], outputs=[difference]),
                gs.Node("Greater", f"{y.name}/greater", inputs=[difference, zero], outputs=[mask]),
                gs.Node("Where", f"{y.name}/where", inputs=[mask, x, zero], outputs=[y]),
            ]
        graph.nodes = nodes
        _save(gs.export_onnx(graph), goal, weights)

    return rewrite


def use_onnx() -> Rewrite:
    """`onnx.load` and `onnx.save_model` alone, without any replacement."""
    import onnx

    def rewrite(source: Path, goal: Path) -> None:
        _save(onnx.load(source), goal, True)

    return rewrite


def _save(proto: Any, goal: Path, weights: bool) -> None:
    import onnx

    if not weights:
        onnx.save(proto, goal)
        return
    onnx.save_model(
        proto, goal, save_as_external_data=True, location=f"{goal.name}.data", size_threshold=1024
    )


CONTENDERS: dict[str, Callable[[], Rewrite]] = {
    "jr_onnx": use_jr_onnx,
    "onnx-ir": use_onnx_ir,
    "graphsurgeon": use_graphsurgeon,
    "graphsurgeon, weights loaded": lambda: use_graphsurgeon(weights=True),
    "onnx.load + save, no rewrite": use_onnx,
}

# The parts of jr_onnx's work: the module in whose name space a function is called, and its name.
PHASES = {
    "load": ("jr_onnx", "load"),
    "find sites": ("jr_onnx.rewrite.retrofit", "find_sites"),
    "undo and compare": ("jr_onnx.rewrite.retrofit", "restore"),
    "onnx.checker": ("jr_onnx.rewrite.retrofit", "check"),
    "save": ("jr_onnx", "save"),
}
CHECKS = ("undo and compare", "onnx.checker")


def measure(contender: str, source: Path, goal: Path) -> Run:
    """Runs one contender in this process, once, and counts what it wrote."""
    rewrite = CONTENDERS[contender]()
    phases = _watch() if contender == "jr_onnx" else {}
    before = sum(_bytes_read())
    cpu, wall = time.process_time(), time.perf_counter()
    rewrite(source, goal)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    read = _bytes_read()[0] - before - source.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import onnx

    result = onnx.load(goal, load_external_data=False)
    nodes = Counter(node.op_type for node in result.graph.node)
    return Run(cpu, wall, peak, read, phases, dict(nodes))


def _watch() -> dict[str, float]:
    """Wraps the functions of `PHASES`; returns the CPU seconds spent in each, filled later."""
    spent = dict.fromkeys(PHASES, 0.0)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                spent[phase] += time.process_time() - start

        return wrapper

    for phase, (module_name, name) in PHASES.items():
        module = importlib.import_module(module_name)
        setattr(module, name, timed(phase, getattr(module, name)))
    return spent


def _bytes_read() -> tuple[int, int]:
    """Returns how many bytes this process read before this call, and by this call (Linux)."""
    text = Path("/proc/self/io").read_text()
    counters = dict(line.split(": ") for line in text.splitlines())
    return int(counters["rchar"]), len(text)


def run(contender: str, source: Path, folder: Path) -> Run:
    """Runs one contender in a process of its own; its output is deleted."""
    goal = folder / "goal.onnx"
    command = [sys.executable, __file__, "worker", contender, str(source), str(goal)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{contender} on {source.name} failed:\n{done.stderr}")
        return Run(**json.loads(done.stdout))
    finally:
        for path in folder.glob(f"{goal.name}*"):
            path.unlink()


def make_model(path: Path, nodes: int, *, value_info: bool) -> None:
    """Writes a chain of Conv and Relu as torch's exporter does, weights inside.

    Args:
        path: the file to write.
        nodes: how many, half of them Relu.
        value_info: declare the type and shape of every value, as torch.export does.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shape: list[str | int | None] = ["batch", 4, 8, 8]
    layers, weights, infos = [], [], []
    x = "input"
    for layer in range(nodes // 2):
        names = [f"layers.{layer}.weight", f"layers.{layer}.bias"]
        arrays = rng.standard_normal((4, 4, 1, 1), np.float32), np.zeros(4, np.float32)
        weights += [numpy_helper.from_array(*each) for each in zip(arrays, names, strict=True)]
        conv, relu = f"conv2d_{layer}", f"relu_{layer}"
        layers += [
            helper.make_node(
                "Conv",
                [x, *names],
                [conv],
                name=f"node_{conv}",
                auto_pad="NOTSET",
                dilations=[1, 1],
                group=1,
                pads=[0, 0, 0, 0],
                strides=[1, 1],
            ),
            helper.make_node("Relu", [conv], [relu], name=f"node_{relu}"),
        ]
        for name in (conv, relu):
            infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        x = relu
    graph = helper.make_graph(
        layers,
        "main_graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        weights,
        value_info=infos if value_info else [],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    path.write_bytes(model.SerializeToString())


def make_external_model(path: Path) -> None:
    """Writes MatMul and Relu layers, their weights in a sparse file that takes no room on disk."""
    from onnx import StringStringEntryProto, TensorProto, helper

    size = WIDTH * WIDTH * 4
    data = path.with_name("weights.bin")
    with data.open("wb") as file:
        file.truncate(LAYERS * size)
    layers, weights = [], []
    x = "input"
    for layer in range(LAYERS):
        weight, product, relu = f"weight_{layer}", f"matmul_{layer}", f"relu_{layer}"
        place = {"location": data.name, "offset": str(layer * size), "length": str(size)}
        weights.append(
            TensorProto(
                name=weight,
                data_type=TensorProto.FLOAT,
                dims=[WIDTH, WIDTH],
                data_location=TensorProto.EXTERNAL,
                external_data=[StringStringEntryProto(key=k, value=v) for k, v in place.items()],
            )
        )
        layers += [
            helper.make_node("MatMul", [x, weight], [product]),
            helper.make_node("Relu", [product], [relu]),
        ]
        x = relu
    shape: list[str | int | None] = ["batch", WIDTH]
    graph = helper.make_graph(
        layers,
        "main_graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    path.write_bytes(model.SerializeToString())


def scaling(sizes: Sequence[int], repeats: int) -> None:
    """Prints the tables of time, memory and phases, for models with and without value_info."""
    for value_info in (True, False):
        results: dict[int, dict[str, list[Run]]] = {}
        for nodes in sizes:
            with tempfile.TemporaryDirectory() as name:
                results[nodes] = _compare(nodes, value_info, Path(name), repeats)
        print(
            f"\nType and shape of every value {'' if value_info else 'not '}declared in the model:"
        )
        _print_times(results)
        _print_phases(results)


def _compare(nodes: int, value_info: bool, folder: Path, repeats: int) -> dict[str, list[Run]]:
    source = folder / "source.onnx"
    _in_a_process("make", str(source), str(nodes), str(int(value_info)))
    contenders = ["jr_onnx", "onnx-ir"]
    contenders += ["graphsurgeon"] if nodes <= LARGEST_FOR_GRAPHSURGEON else []
    runs: dict[str, list[Run]] = {contender: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            done = run(contender, source, folder)
            if done.nodes.get("Relu") or done.nodes["Where"] != nodes // 2:
                raise RuntimeError(f"{contender} did not replace every Relu: {done.nodes}")
            runs[contender].append(done)
    return runs


def _print_times(results: dict[int, dict[str, list[Run]]]) -> None:
    print(
        "\n| nodes | jr_onnx: CPU s | without its checks | onnx-ir | graphsurgeon "
        "| onnx-ir / jr_onnx | graphsurgeon / jr_onnx "
        "| peak MB: jr_onnx | onnx-ir | graphsurgeon |\n|" + "--:|" * 10
    )
    for nodes, runs in results.items():
        ours = runs["jr_onnx"]
        row = [f"{nodes:,}", _seconds([each.cpu for each in ours])]
        row.append(_seconds([_core(each) for each in ours]))
        others = [runs.get("onnx-ir"), runs.get("graphsurgeon")]
        row += [_seconds([each.cpu for each in other]) if other else "-" for other in others]
        row += [_ratio(other, ours) if other else "-" for other in others]
        row += [
            f"{median(each.peak for each in contender):.0f}" if contender else "-"
            for contender in (ours, *others)
        ]
        print(f"| {' | '.join(row)} |")


def _core(done: Run) -> float:
    return done.cpu - sum(done.phases[phase] for phase in CHECKS)


def _ratio(theirs: list[Run], ours: list[Run]) -> str:
    pairs = list(zip(theirs, ours, strict=True))
    checked = median(their.cpu / our.cpu for their, our in pairs)
    core = median(their.cpu / _core(our) for their, our in pairs)
    return f"{checked:.1f} ({core:.1f})"


def _print_phases(results: dict[int, dict[str, list[Run]]]) -> None:
    print(
        f"\n| nodes | {' | '.join(PHASES)} | plan, write nodes and manifest |\n|"
        + "--:|" * (len(PHASES) + 2)
    )
    for nodes, runs in results.items():
        ours = runs["jr_onnx"]
        row = [_seconds([each.phases[phase] for each in ours]) for phase in PHASES]
        rest = _seconds([each.cpu - sum(each.phases.values()) for each in ours])
        print(f"| {nodes:,} | {' | '.join(row)} | {rest} |")


def _seconds(values: Sequence[float]) -> str:
    middle = median(values)
    return f"{middle:.3f}" if middle < 0.1 else f"{middle:.2f}"


def external(repeats: int) -> None:
    """Prints the table of the model with 3 GB of weights outside."""
    print(
        "\n| | CPU s | wall s | peak MB | bytes read beside the .onnx file |\n|---|--:|--:|--:|--:|"
    )
    enough = _gigabytes_free() >= GIGABYTES_NEEDED
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.onnx"
        _in_a_process("make-external", str(source))
        runs: dict[str, list[Run]] = {contender: [] for contender in CONTENDERS}
        for _ in range(repeats):
            for contender in CONTENDERS:
                if enough or "load" not in contender:
                    runs[contender].append(run(contender, source, Path(name)))
    for contender, done in runs.items():
        if not done:
            print(f"| {contender} | needs {GIGABYTES_NEEDED} GB of memory | | | |")
            continue
        row = [_seconds([each.cpu for each in done]), _seconds([each.wall for each in done])]
        row.append(f"{median(each.peak for each in done):.0f}")
        row.append(f"{median(each.read for each in done):,.0f}")
        print(f"| {contender} | {' | '.join(row)} |")


def _gigabytes_free() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(line for line in lines if line.startswith("MemAvailable"))
    return int(free.split()[1]) / 2**20


def _in_a_process(*arguments: str) -> None:
    subprocess.run([sys.executable, __file__, *arguments], check=True)


def profile(nodes: int) -> None:
    """Prints where jr_onnx spends its time, function by function."""
    import cProfile
    import pstats

    rewrite = use_jr_onnx()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.onnx"
        make_model(source, nodes, value_info=True)
        profiler = cProfile.Profile()
        profiler.runcall(rewrite, source, Path(name) / "goal.onnx")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; the hidden commands are its own processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("scaling", "external"):
        command = commands.add_parser(name)
        command.add_argument("--repeats", type=int, default=3, metavar="N")
        if name == "scaling":
            command.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="NODES")
    command = commands.add_parser("profile")
    command.add_argument("--nodes", type=int, default=50_000)
    for name, positions in (
        ("worker", ("contender", "source", "goal")),
        ("make", ("path", "nodes", "value_info")),
        ("make-external", ("path",)),
    ):
        command = commands.add_parser(name)
        for position in positions:
            command.add_argument(position)
    given = parser.parse_args(arguments)
    if given.command == "scaling":
        scaling(given.sizes, given.repeats)
    elif given.command == "external":
        external(given.repeats)
    elif given.command == "profile":
        profile(given.nodes)
    elif given.command == "worker":
        print(json.dumps(asdict(measure(given.contender, Path(given.source), Path(given.goal)))))
    elif given.command == "make":
        make_model(Path(given.path), int(given.nodes), value_info=given.value_info == "1")
    else:
        make_external_model(Path(given.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
