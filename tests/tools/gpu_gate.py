"""Run training on a CUDA device that is not there (`fake_cuda.py`), in a process of its own:

    python -m tests.tools.gpu_gate runs SOURCE CORPUS FOLDER    # every path of a run, against the same run on the CPU
    python -m tests.tools.gpu_gate roofline                     # waits, kernels and least time of a step of a 1B model
    python -m tests.tools.gpu_gate compiled                     # least time of its distilled step with --compile
    python -m tests.tools.gpu_gate all SOURCE CORPUS FOLDER     # both with few microbatches, and two devices' error

`runs` stops and resumes every run after a few steps. Each prints one line of JSON.
"""

# ruff: noqa: E402  # fake_cuda comes before torch

from __future__ import annotations

import contextlib
import json
import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from fake_cuda import BYTES_PER_SECOND, FLOPS_PER_SECOND, KERNEL_SECONDS, UNCOUNTED, UNCOUNTED_PHASE  # isort: skip
from fake_cuda import Device, aten, fake_cuda  # isort: skip

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from training import command, metrics, run

from efficientllm.train import run as training_run
from efficientllm.train import training_step
from efficientllm.train.compute import loss as loss_module
from efficientllm.train.compute.optimizer import AdamW
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.config.sections import OptimizerConfig, SourceConfig, TrainConfig
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.trainer import Trainer
from research.gpu_hour import LLAMA_1B, make_step, random_model

RUNS: dict[str, str] = {
    "taylor1": "--prune attention,ffn,stem,blocks --block-tokens 128",
    "taylor2": "--saliency taylor2 --prune attention,ffn,stem --gradient-accumulation 2 --batch-size 2",
    "fisher": "--saliency fisher --prune layers,ffn --block-tokens 128 --gradient-accumulation 2 --batch-size 2",
    "magnitude": "--saliency magnitude --qat q4_0",
    "random": "--saliency random",
    "flap": "--saliency flap --prune attention,ffn --distill 1 --layout uniform",
    "wanda": "--saliency wanda --prune attention,ffn --weight-update obs",
    "minitron": "--saliency minitron --prune attention,ffn --qat int4-block32",
    "token-fisher": "--saliency token-fisher --recover least-squares --recover-tokens 256 --distill 1 "
    "--prune attention,ffn,vocabulary,blocks --block-tokens 128 --vocabulary-tokens 2000 --activation-checkpointing",
    "rounded": "--saliency token-fisher --prune attention,ffn,vocabulary --vocabulary-rows 384 --distill 1 --qat 8da4w "
    "--vocabulary-tokens 2000 --teacher self --recover least-squares --recover-tokens 256 --dtype bfloat16",
}
"""Arguments of each run. Together they have every saliency, kind of group and QAT grid. The last is not as on the CPU,
because both devices round other sums to bf16."""
SHARED = ("--tokens", "640", "--eval-tokens", "64", "--checkpoint-every", "0")
SHARED += ("--prune-start", "0.2", "--prune-end", "0.8", "--removals", "3")
"""Five steps, with removals after the first, the third and the fourth."""
STOP_AT = 2
"""Step after which a run on the GPU is stopped and resumed."""


def runs(source: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    """Train every run of RUNS on both devices. Return {name: {device: its metrics}}."""
    found: dict[str, Any] = {}
    plots = (
        mock.patch.object(training_run, f"plot_{name}", _draw_nothing)
        for name in ("architecture", "training", "pruning")
    )
    with contextlib.ExitStack() as stack:
        for each in plots:
            stack.enter_context(each)
        for name, more in RUNS.items():
            found[name] = {}
            arguments = command(source, corpus, folder, *SHARED, *more.split())
            for device in ("cpu", "cuda"):
                output = folder / f"{name}-{device}"
                on_device = [*arguments, "--output", str(output), "--device", device]
                if device == "cuda":
                    with fake_cuda(), mock.patch.object(Trainer, "_step", _stopping(Trainer._step)):
                        assert run(on_device) == 130, name
                    on_device.append("--resume")
                with fake_cuda() if device == "cuda" else contextlib.nullcontext() as counted:
                    assert run(on_device) == 0, name
                found[name][device] = metrics(output)
                if counted is not None:
                    found[name]["waits"] = list(counted.syncs)
    return found


def _draw_nothing(*arguments: Any) -> None:
    """Write an empty file instead of a plot, which is its last argument."""
    Path(arguments[-1]).touch()


def _stopping(real: Any) -> Any:
    def step(trainer: Trainer) -> dict[str, Any]:
        record = real(trainer)
        if record["step"] == STOP_AT:
            trainer.stop_signal.name = "SIGTERM"
        return record

    return step


def error_of_two_devices() -> str:
    """Return the error of an operation on tensors of two devices."""
    with fake_cuda():
        try:
            torch.zeros(0).lerp_(torch.ones(0, device="cuda"), 0.5)
        except RuntimeError as error:
            return str(error)
    return "none"


META = torch.device("meta")
SHAPES = {
    "1b": LLAMA_1B,
    "1b-half": Architecture("llama", 2048, 64, 128_256, True, (LayerShape(12, 3, 2560),) * 16),
}
"""Llama-3.2-1B, and half of its layers' parameters."""


STEPS = (
    ("1b", "", 1.0, "float32", 4, 1),
    ("1b-half", "token-fisher", 1.0, "float32", 4, 1),
    ("1b-half", "taylor1", 0.0, "bfloat16", 1, 8),
)
"""Shape, saliency, weight of distillation, type of moments, sequences of a microbatch, microbatches."""
SEQUENCE_LENGTH = 2048


def step_of(
    shape: str, saliency: str, distill: float, moments: Any, batch_size: int, accumulation: int
) -> dict[str, Any]:
    """Return waits, kernels and least seconds of a training step of a shape on one H100."""
    architecture = SHAPES[shape]
    optimizer = OptimizerConfig(
        tokens=10**9,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        distill=distill,
        optimizer_dtype=moments,
    )
    config = TrainConfig(
        SourceConfig(sequence_length=SEQUENCE_LENGTH),
        PruneConfig(target_ratio=0.5, saliency=saliency) if saliency else PruneConfig(prune=("none",)),
        optimizer,
    )
    with fake_cuda(has_values=False) as device:
        model, teacher = random_model(architecture, META), None
        if distill:
            teacher = random_model(SHAPES[shape.removesuffix("-half")], META)
            teacher = teacher.to("cuda", torch.bfloat16).eval().requires_grad_(False)
        step = make_step(config, model, architecture, teacher, torch.device("cuda"))
        with phases(device):
            step.run(contextlib.nullcontext())  # the first step makes the optimizer's tensors
            device.clear()
            step.run(contextlib.nullcontext())
        seconds = sum(device.seconds.values())
        return {
            "shape": shape, "saliency": saliency, "distill": distill, "microbatches": accumulation,
            "syncs": sum(device.syncs.values()), "lines": dict(device.syncs.most_common()),
            "kernels": device.kernels, "tokens_per_second": round(step.tokens / seconds),
            "seconds": seconds,
            "shares": {name: round(each / seconds, 3) for name, each in device.seconds.items()},
        }  # fmt: skip


@contextlib.contextmanager
def phases(device: Device) -> Iterator[None]:
    """Attribute the device's time to the loss and the optimizer in this block."""

    def timed(owner: Any, name: str, phase: str) -> Any:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with device.during(phase):
                return real(*arguments, **options)

        return mock.patch.object(owner, name, call)

    def fused(logits: Tensor, targets: Tensor, theirs: Tensor | None, *rest: Any) -> Any:
        with device.during(UNCOUNTED_PHASE):
            found = loss_module._losses_of_rows(logits, targets, theirs, *rest)
        passes = 4 if theirs is None else 7  # the maximum, the sum and the difference of each read it, one writes
        device.kernels += passes
        device.add(passes * logits.numel() * logits.element_size())
        return found

    with (
        mock.patch.object(loss_module, "fuses_on_gpu", True),
        mock.patch.object(loss_module, "_fused_losses_of_rows", return_value=fused),
        timed(loss_module, "cross_entropy", "loss"),
        timed(loss_module._ChunkedLoss, "backward", "loss"),
        timed(AdamW, "step", "optimizer"),
        timed(training_step, "gradient_norm", "optimizer"),
    ):
        yield


def compiled(shape: str = "1b", batch_size: int = 4) -> dict[str, Any]:
    """Return the least time of a distilled step whose layers are compiled, on one H100.

    All operations between two products or attentions are one kernel, which reads and writes every tensor once. The rest
    of the step is as in `step_of`.
    """
    architecture = SHAPES[shape]
    size = (batch_size, SEQUENCE_LENGTH)
    of_layer = {"student": _seconds_of_layer(architecture, size, True)}
    of_layer["teacher"] = _seconds_of_layer(architecture, size, False)
    eager = []
    for count in (1, 2):
        SHAPES["few layers"] = replace(architecture, layers=architecture.layers[:count])
        few = step_of("few layers", "", 1.0, "float32", batch_size, 1)
        eager.append(few["seconds"] * few["shares"]["layers"])
    step = step_of(shape, "", 1.0, "float32", batch_size, 1)
    # without the layers: loss, head and optimizer, and embedding and last norm, which one layer less leaves
    others = step["seconds"] * (1 - step["shares"]["layers"]) + 2 * eager[0] - eager[1]
    layers = len(architecture.layers) * sum(of_layer.values())
    tokens = batch_size * SEQUENCE_LENGTH
    return {
        "shape": shape, "tokens_per_second": round(tokens / (layers + others)),
        "ms": {name: round(1000 * each, 2) for name, each in {**of_layer, "others": others}.items()},
    }  # fmt: skip


def _seconds_of_layer(architecture: Architecture, size: tuple[int, int], is_trained: bool) -> float:
    """Return the least time of one layer on tokens of a `size` [B, S], with its backward pass if it is trained."""
    one = replace(architecture, layers=architecture.layers[:1])
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:  # names of AOTDispatchCompiler
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        model = random_model(one, torch.device("cpu"))
        states = torch.zeros(*size, one.hidden_size, dtype=torch.float32 if is_trained else torch.bfloat16)
        states.requires_grad_(is_trained)
        positions = model.model.rotary_emb(states, torch.arange(size[1])[None])
        layer = model.model.layers[0]

        def forward(parameters: dict[str, Tensor], states: Tensor, positions: Any) -> Tensor:
            return functional_call(layer, parameters, (states,), {"position_embeddings": positions})

        traced = aot_function(forward, keep, partition_fn=min_cut_rematerialization_partition)
        parameters = dict(layer.named_parameters())
        if not is_trained:
            parameters = {name: each.detach().to(torch.bfloat16) for name, each in parameters.items()}
        with torch.set_grad_enabled(is_trained):
            found = traced(parameters, states, positions)
        if is_trained:
            found.sum().backward()
    return sum(map(_fused_seconds, graphs))


def _fused_seconds(graph: torch.fx.GraphModule) -> float:
    """Return the least time of a graph whose operations of one stage between products are fused."""
    stages: dict[Any, int] = {}
    fused: dict[int, set[Any]] = defaultdict(set)
    seconds = 0.0
    node: Any
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or _is_free(node):
            stages[node] = max((stages[each] for each in inputs), default=0)
        elif (count_flops := _flop_formula(node.target.overloadpacket)) is not None:
            stages[node] = max((stages[each] | 1 for each in inputs), default=1)  # products have odd stages
            values = tree_map(lambda each: each.meta["val"] if isinstance(each, torch.fx.Node) else each, node.args)
            flops = count_flops(*values, out_val=node.meta["val"])
            num_bytes = sum(map(_bytes_of, {*map(_stored, inputs), node}))
            seconds += max(flops / FLOPS_PER_SECOND, num_bytes / BYTES_PER_SECOND, KERNEL_SECONDS)
        else:
            stages[node] = max((stages[each] + stages[each] % 2 for each in inputs), default=0)
            fused[stages[node]].add(node)
    for nodes in fused.values():
        read = {_stored(each) for node in nodes for each in node.all_input_nodes} - nodes
        written = {node for node in nodes if not _readers(node) <= nodes}
        seconds += max(sum(map(_bytes_of, read | written)) / BYTES_PER_SECOND, KERNEL_SECONDS)
    return seconds


ON_GPU: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
"""Operations of a graph that was traced on a CPU -> those of a GPU."""


def _flop_formula(operation: Any) -> Callable[..., int] | None:
    """Return the function that counts the FLOP of a product or of attention, or None for other operations."""
    return flop_registry.get(ON_GPU.get(operation, operation))


def _is_free(node: Any) -> bool:
    """Tell whether a node of a graph computes nothing."""
    return node.target is operator.getitem or node.target in UNCOUNTED or getattr(node.target, "is_view", False)


def _stored(node: Any) -> Any:
    """Return the node whose tensor a view of it reads."""
    is_view = _is_free(node) and node.target is not operator.getitem and node.args
    return _stored(node.args[0]) if is_view else node


def _readers(node: Any) -> set[Any]:
    """Return the nodes that read the tensor of a node or views of it."""
    return set().union(*(_readers(user) if _is_free(user) else {user} for user in node.users))


def _bytes_of(node: Any) -> int:
    tensors = [each for each in tree_leaves(node.meta["val"]) if isinstance(each, Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors)


def main() -> None:
    """Run the command of the arguments."""
    what, *paths = sys.argv[1:]
    if what == "all":
        few = [(*case[:-1], min(case[-1], 3)) for case in STEPS]
        parts = {"runs": runs(*map(Path, paths)), "roofline": [step_of(*case) for case in few]}
        print(json.dumps({**parts, "mixed": error_of_two_devices()}))
    elif what == "compiled":
        print(json.dumps(compiled()))
    else:
        print(json.dumps(runs(*map(Path, paths)) if what == "runs" else [step_of(*case) for case in STEPS]))


if __name__ == "__main__":
    main()
