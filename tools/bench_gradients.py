"""Times forward and backward passes on onnxruntime against torch, with the same weights.

    x, y --jr_onnx's gradient graph on onnxruntime--> cross entropy, its gradient for x
         --torch eager, channels-last, torch.compile, weights frozen-->  the same

Every contender runs the same images in micro-batches of several sizes; its best size counts. All
take their turns one after another, again and again; a ratio is the median over the rounds of
(contender / jr_onnx in the same round): CPU seconds with one thread, wall-clock time with more.
Each network and number of threads has a process of its own. Threads share each operator, or, side
by side, have a micro-batch each, with one thread for its operators.

Examples:
    python tools/bench_gradients.py
    python tools/bench_gradients.py --threads 2 --side-by-side
    python tools/bench_gradients.py --networks LeNet ViT --threads 1 --no-compile
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import torch
from architectures import ARCHITECTURES, exported, loss_and_gradient, network
from numpy.typing import NDArray

import jr_onnx as jr
from jr_onnx.session import Session

OURS = "jr_onnx"
BATCHES = (2, 4, 8, 16, 32, 64)
TORCH_BATCHES = (16, 32, 64, 128)
COMPILED_BATCHES = (16, 64)  # each is compiled anew, which takes a minute
IMAGES = 128
# Threads of the contender before spin on for a while, and small networks are done in milliseconds.
PAUSE, LEAST = 0.1, 0.2  # seconds: without work, and of work that is timed
# How far losses and gradients may differ, in median relative error: they shall be the same thing.
TOLERANCE = 1e-4

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
# (x, y) -> loss, gradient
Run = Callable[[Images, Labels], tuple[Any, Any]]


def use_onnxruntime(graph: jr.autodiff.InputGradient, batch: int, threads: int) -> Run:
    """One session, whose operators are shared among the threads."""
    session = Session(graph.model, device="cpu", threads=threads, batch=batch)
    wanted = (graph.loss, graph.gradient)

    def run(x: Images, y: Labels) -> tuple[Any, Any]:
        loss, gradient = session.run({graph.x: x, graph.compared["labels"]: y}, wanted)
        return loss, gradient

    return run


def use_torch(module: Callable[..., Any], *, channels_last: bool = False) -> Run:
    """Autograd; channels-last images where the network takes more than one channel."""

    def run(x: Images, y: Labels) -> tuple[Any, Any]:
        images = torch.from_numpy(x)
        if channels_last and x.shape[1] > 1:
            images = images.contiguous(memory_format=torch.channels_last)
        return loss_and_gradient(module, images, torch.from_numpy(y))

    return run


def contenders(
    name: str, threads: int, at_once: int, *, compiled: bool
) -> dict[tuple[str, int], Run]:
    """Returns what runs all images, by contender and micro-batch.

    Args:
        name: of the network.
        threads: on each operator.
        at_once: micro-batches that run at the same time.
        compiled: whether torch.compile is among them.
    """
    module = network(name)
    graph = jr.input_gradient(exported(module, ARCHITECTURES[name].image))
    found: dict[tuple[str, int], Run] = {}
    for batch in BATCHES:
        found[OURS, batch] = _in_batches(use_onnxruntime(graph, batch, threads), batch, at_once)
    last = network(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    runs = {
        "torch eager": use_torch(module),
        "torch channels-last": use_torch(last, channels_last=True),
    }
    if compiled:
        runs["torch.compile"] = use_torch(torch.compile(network(name), dynamic=False))
        runs["torch.compile, channels-last"] = use_torch(
            torch.compile(last, dynamic=False), channels_last=True
        )
    for contender, run in runs.items():
        for batch in COMPILED_BATCHES if "compile" in contender else TORCH_BATCHES:
            found[contender, batch] = _in_batches(run, batch, at_once)
    return found


def _in_batches(run: Run, batch: int, at_once: int) -> Run:
    """Runs micro-batches one after another, or so many at the same time."""
    pool = ThreadPoolExecutor(at_once) if at_once > 1 else None

    def run_all(x: Images, y: Labels) -> tuple[Any, Any]:
        starts = range(0, len(x), batch)
        parts = [(x[start : start + batch], y[start : start + batch]) for start in starts]
        done = list((pool.map if pool else map)(lambda part: run(*part), parts))
        losses, gradients = (
            [np.asarray(value) for value in each] for each in zip(*done, strict=True)
        )
        return np.concatenate(losses), np.concatenate(gradients)

    return run_all


def measure(
    name: str, threads: int, rounds: int, *, side_by_side: bool, compiled: bool
) -> dict[str, Any]:
    """Runs one network's contenders in turn, in this process.

    Returns:
        By contender: its best micro-batch, and the seconds that all images took, by round.
    """
    warnings.filterwarnings("ignore")  # of torch.compile's own
    shared, at_once = (1, threads) if side_by_side else (threads, 1)
    torch.set_num_threads(shared)
    clock = time.process_time if threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    x = rng.random((IMAGES, *ARCHITECTURES[name].image), np.float32)
    y = np.arange(IMAGES) % 10
    runs = contenders(name, shared, at_once, compiled=compiled)
    _check_agreement(name, {key: run(x, y) for key, run in runs.items()})
    spent = _in_turn({key: functools.partial(run, x, y) for key, run in runs.items()}, 3, clock)
    best = {}
    for contender in dict.fromkeys(contender for contender, _ in runs):
        sizes = [batch for other, batch in runs if other == contender]
        best[contender] = min(sizes, key=lambda size: median(spent[contender, size]))
    finals = {key: functools.partial(runs[key], x, y) for key in best.items()}
    spent = _in_turn(finals, rounds, clock)
    return {
        contender: {"batch": batch, "seconds": spent[contender, batch]}
        for contender, batch in best.items()
    }


def _check_agreement(name: str, results: Mapping[tuple[str, int], tuple[Any, Any]]) -> None:
    expected = results["torch eager", IMAGES][1].reshape(IMAGES, -1)
    for (contender, batch), (_, gradient) in results.items():
        error = np.linalg.norm(gradient.reshape(IMAGES, -1) - expected, axis=1)
        relative = float(np.median(error / np.linalg.norm(expected, axis=1)))
        # The median, because rounding flips units at a kink: see tests/test_gradients_networks.py.
        if relative > 1e-2 or (name != "MobileNetV2" and relative > TOLERANCE):
            raise RuntimeError(f"{name}: {contender} at {batch} is {relative:.1e} off")


def _in_turn(
    runs: Mapping[Any, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {key: [] for key in runs}
    order = list(runs)
    for number in range(rounds):
        turn = number % len(order)
        for key in order[turn:] + order[:turn]:
            time.sleep(PAUSE)
            start, times = clock(), 0
            while times == 0 or clock() - start < LEAST:
                runs[key]()
                times += 1
            found[key].append((clock() - start) / times)
    return found


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Returns the ratios to jr_onnx as Markdown: contender x network."""
    lines = [f"| | {' | '.join(results)} |", "|---|" + "--:|" * len(results)]
    ours = {name: result[OURS]["seconds"] for name, result in results.items()}
    row = [f"{median(seconds) / IMAGES * 1e3:.3g}" for seconds in ours.values()]
    lines.append(f"| {OURS}, ms an image | {' | '.join(row)} |")
    for contender in next(iter(results.values())):
        row = []
        for name, result in results.items():
            seconds, batch = result[contender]["seconds"], result[contender]["batch"]
            ratios = [one / other for one, other in zip(seconds, ours[name], strict=True)]
            row.append(f"{median(ratios):.2f} ({batch})")
        lines.append(f"| {contender} | {' | '.join(row)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--networks", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each")
    parser.add_argument(
        "--side-by-side", action="store_true", help="a micro-batch a thread, not an operator"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        (name,), (threads,) = given.networks, given.threads
        options = {"side_by_side": given.side_by_side, "compiled": not given.no_compile}
        print(json.dumps(measure(name, threads, given.rounds, **options)))
        return 0
    for threads in given.threads:
        results = {name: _in_its_process(name, threads, given) for name in given.networks}
        how = f"{threads} thread{'s' * (threads > 1)}{', side by side' * given.side_by_side}"
        print(f"\n{how}\n\n{table(results)}", flush=True)
    return 0


def _in_its_process(name: str, threads: int, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", "--networks", name, "--threads", str(threads)]
    command += ["--rounds", str(given.rounds), *["--no-compile"] * given.no_compile]
    command += ["--side-by-side"] * given.side_by_side
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{name}, threads {threads}: done", file=sys.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
