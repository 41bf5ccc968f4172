"""Two-process runs on this machine (gloo) against one process on the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import grow, small_disk
from several_runs import MARK, UNREADABLE
from tiny import tiny_architecture, tiny_model, tiny_tokenizer
from training import command, expect_same_run, metrics, run, weights

from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.irregular import save_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

MODES = ("ddp", "fsdp")
BETWEEN_REMOVALS = "ddp --prune-every 4 --prune-end 0.8"
RESUMED = {BETWEEN_REMOVALS: 10, "fsdp": 10, "ddp --gradient-accumulation 2": 9}
RESUMED["fsdp --reduce-once --gradient-accumulation 2"] = 9
"""Mode and flags of a run that gets a signal in its tenth step -> step of its checkpoint."""
HARMED = {"ddp": BETWEEN_REMOVALS, "fsdp": "fsdp"}
"""Mode -> mode and flags of runs whose newest checkpoint or corpus is harmed before they are resumed."""
HANG_SECONDS = 900
RECOVERED = ("--recover", "least-squares", "--recover-tokens", "256", "--removals", "2", "--distill", "1")
RECOVERED += ("--vocabulary-tokens", "2000")
ONE_AND_TWO = {
    "curvature": ("ddp", "taylor2", "attention,ffn,stem", ()),
    "rounded": ("ddp", "fisher", "attention,ffn,stem", ("--qat", "q4_0")),
    "blocks": ("ddp", "taylor1", "ffn,blocks", ()),
    "sharded and rounded blocks": ("fsdp", "taylor1", "ffn,blocks", ("--qat", "q4_0")),
    "reduced once": (
        "fsdp --reduce-once --batch-size 1 --gradient-accumulation 2",
        "taylor1",
        "attention,ffn,stem",
        RECOVERED,
    ),
    "recovered": ("ddp", "token-fisher", "attention,ffn,vocabulary", RECOVERED),
    "sharded and recovered": ("fsdp", "token-fisher", "attention,ffn,vocabulary", RECOVERED),
    "fewer rows": ("fsdp", "token-fisher", "attention,ffn,vocabulary", (*RECOVERED, "--vocabulary-rows", "384")),
    "offloaded and recovered": ("fsdp --offload", "token-fisher", "attention,ffn,stem,blocks", RECOVERED),
}
"""Name -> mode, criterion, removed groups and other flags of a run that one process and two make alike."""
IN_BF16 = ("--tokens", "1280", "--batch-size", "2", "--dtype", "bfloat16", "--save-dtype", "float32", *RECOVERED)
IN_BF16 += ("--prune", "ffn", "--prune-end", "1", "--checkpoint-every", "0")
"""Flags of a run whose last removal and refit follow the last step."""


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module on two ranks, ahead of other tests, since one waits for the other. One that hangs fails with the
    stacks of both."""
    ahead = ("nice", "-n", "-10")
    launcher = [*ahead, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONFAULTHANDLER": "1",
    }
    command, pipe = [*launcher, "-m", *map(str, arguments)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            said, errors = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            for rank in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(rank), signal.SIGABRT)  # its faulthandler prints the stacks
            said, errors = process.communicate()
            pytest.fail(f"the ranks hang:\n{said[-3000:]}\n{errors[-20_000:]}")
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def several(folder: Path, runs: dict[str, list[str]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """{name: (output, exit code and parameters that are alive)} of runs in two processes."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    done = torchrun("several_runs", file)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for part in done.stdout.split(MARK)[1:]:
        name, _, said = part.strip().partition("\n")
        found[name] = said, json.loads(said.splitlines()[-1])
    with (folder / "stderr.txt").open("a", encoding="utf-8") as file_of_errors:  # of all calls
        file_of_errors.write(done.stderr)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


def shared_flags(name: str) -> list[str]:
    """Flags that the runs of one process and of two have in common: ten steps."""
    _, saliency, space, more = ONE_AND_TWO[name]
    flags = ["--tokens", "1280", "--batch-size", "2", "--saliency", saliency, "--prune", space]
    return [*flags, "--checkpoint-every", "0", "--block-tokens", "256", *more]


def resumable_flags(mode: str) -> list[str]:
    size = "1" if "accumulation" in mode else "2"
    flags = ["--batch-size", size, "--data-parallel", *mode.split(), "--weight-update", "obs", "--qat", "q4_0"]
    # right before the checkpoint, too: a forward pass that no backward one follows
    return [*flags, "--eval-every", "5", "--tokens", "1920"]


@pytest.fixture(scope="module")
def ended(folder: Path, source_folder: Path, corpus: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    runs = {
        name: command(source_folder, corpus, folder / name, *shared_flags(name), "--data-parallel", *mode.split())
        for name, (mode, *_) in ONE_AND_TWO.items()
    }
    runs["bf16"] = command(source_folder, corpus, folder / "bf16", *IN_BF16, "--data-parallel", "fsdp")
    for mode in RESUMED:
        for name in (f"straight {mode}", f"stopped {mode}"):
            runs[name] = command(source_folder, corpus, folder / name, *resumable_flags(mode))
    for mode in MODES:
        output, flags = folder / f"unreadable {mode}", ["--batch-size", "2", "--checkpoint-every", "0"]
        runs[f"unreadable {mode}"] = command(source_folder, corpus, output, *flags, "--data-parallel", mode)
        text = Path(shutil.copy(corpus, folder / f"changed {mode}.jsonl"))
        output, flags = folder / f"changed {mode}", resumable_flags(HARMED[mode])
        runs[f"stopped changed {mode}"] = command(source_folder, text, output, *flags)
        # a stem channel is in every tensor, so each is replaced where one goes
        more = ["--prune", "stem", "--target-ratio", "0.8", "--tokens", "640", "--data-parallel", mode]
        runs[f"stem {mode}"] = command(source_folder, corpus, folder / f"stem {mode}", "--batch-size", "2", *more)
    found = several(folder, runs)
    for mode in MODES:
        shutil.copytree(folder / f"stopped {HARMED[mode]}", folder / f"damaged {mode}")
    return found


@pytest.fixture(scope="module")
def resumed(
    ended: dict[str, tuple[str, dict[str, Any]]], folder: Path, source_folder: Path, corpus: Path
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Resume the stopped runs, some with a damaged checkpoint or a changed corpus."""
    runs = {
        mode: command(source_folder, corpus, folder / f"stopped {mode}", *resumable_flags(mode)) for mode in RESUMED
    }
    for mode in MODES:
        (folder / f"damaged {mode}" / "checkpoints" / "step-00000010" / "state" / "rank-1.pt").write_bytes(b"")
        with (folder / f"changed {mode}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write('{"text": "Another document."}\n')
        for name, text in (("damaged", corpus), ("changed", folder / f"changed {mode}.jsonl")):
            output = folder / f"{name} {mode}"
            runs[output.name] = command(source_folder, text, output, *resumable_flags(HARMED[mode]))
    return several(folder, {name: [*arguments, "--resume"] for name, arguments in runs.items()})


@pytest.mark.parametrize("name", ONE_AND_TWO)
def test_two_processes_remove_the_same_groups_as_one(
    name: str,
    ended: dict[str, tuple[str, dict[str, Any]]],
    folder: Path,
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
) -> None:
    """Global batch of 4: two ranks of 2, or one process that accumulates 2 microbatches of 2."""
    one = command(source_folder, corpus, tmp_path / "one", *shared_flags(name), "--gradient-accumulation", "2")
    assert run(one) == 0
    said, outcome = ended[name]
    assert outcome["code"] == 0
    assert f"2 ranks ({ONE_AND_TWO[name][0].split()[0]})" in said
    assert [each.get("removed") for each in metrics(folder / name)] == [
        each.get("removed") for each in metrics(tmp_path / "one")
    ]
    measured = [metrics(run)[0]["perplexity_source"] for run in (folder / name, tmp_path / "one")]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    ours, theirs = (Architecture.from_folder(run / "model") for run in (folder / name, tmp_path / "one"))
    assert ours == theirs
    found, expected = weights(folder / name), weights(tmp_path / "one")
    for tensor in expected:  # sums run in another order, and Adam amplifies rounding where gradients vanish
        assert (found[tensor] - expected[tensor]).abs().mean() < 1e-4, tensor


def test_sharded_layers_in_bf16_lose_no_bits_of_their_weights(
    ended: dict[str, tuple[str, dict[str, Any]]], folder: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Ranks send bf16 weights. Only gains of norms differ by that, so losses are near those of one process."""
    assert ended["bf16"][1]["code"] == 0
    one = command(source_folder, corpus, tmp_path / "one", *IN_BF16, "--gradient-accumulation", "2")
    assert run(one) == 0
    losses = [[each["loss"] for each in metrics(run) if "loss" in each] for run in (folder / "bf16", tmp_path / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    for name, weight in weights(folder / "bf16").items():
        if "proj" in name:
            assert (weight != weight.to(torch.bfloat16)).float().mean() > 0.5, name


HEAVY = tiny_architecture(layers=(LayerShape(8, 8, 4096),) * 8, hidden_size=512, head_dim=64, tied=False)
"""59M parameters, of which a layer has an eighth."""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two sources in bf16: `small` and `large`, the shape HEAVY."""
    folder = tmp_path_factory.mktemp("heavy")
    for name, shape in (("small", tiny_architecture()), ("large", HEAVY)):
        save_checkpoint(tiny_model(shape).to(torch.bfloat16), tiny_tokenizer(), folder / name)
    return folder


def test_a_rank_that_loads_holds_its_shard_and_one_layer(heavy: Path) -> None:
    """Bound the memory by the model in fp32 and a teacher in bf16. One process holds all of them."""
    script, environment = ("rank_memory", str(heavy)), {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    one = subprocess.run([sys.executable, "-m", *script], capture_output=True, text=True, env=environment, check=False)
    added = []
    for done in (torchrun(*script), one):
        assert done.returncode == 0, done.stderr[-3000:]
        added.append(json.loads(done.stdout.splitlines()[-1])["added"])
    ranks, (alone,) = added
    size = HEAVY.num_parameters * (4 + 2)
    layer = 4 * (HEAVY.num_parameters - HEAVY.embedding_parameters) / len(HEAVY.layers)
    slack = 20_000_000
    assert alone > size - slack
    assert max(ranks) < size / 2 + layer + slack


def test_ranks_print_a_common_refusal_once(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    done = torchrun(
        "efficientllm.runtime.start", "train", *command(source_folder, corpus, tmp_path / "run", "--saliency", "best")
    )
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert [error.partition(";")[0] for error in errors] == ["error: --saliency best: unknown"], done.stderr


def test_stopped_distributed_run_resumes_bit_identically(
    ended: dict[str, tuple[str, dict[str, Any]]],
    folder: Path,
    source_folder: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Steps 1 to 10 in one run and the rest in another, in other processes, against all in one.

    A signal is answered after the microbatch.
    """
    for mode, step in RESUMED.items():
        assert ended[f"straight {mode}"][1]["code"] == 0
        assert ended[f"stopped {mode}"][1]["code"] == 130
        checkpoints = [path.name for path in (folder / f"stopped {mode}" / "checkpoints").iterdir()]
        assert max(checkpoints) == f"step-{step:08d}"
    stopped = folder / f"stopped {BETWEEN_REMOVALS}"
    assert run([*command(source_folder, corpus, stopped, *resumable_flags(BETWEEN_REMOVALS)), "--resume"]) == 2
    assert "--resume: the run has 2 ranks, not 1; start as many" in capsys.readouterr().err
    resumed = request.getfixturevalue("resumed")
    for mode in RESUMED:
        assert resumed[mode][1]["code"] == 0
        expect_same_run(folder / f"stopped {mode}", folder / f"straight {mode}")


@pytest.mark.parametrize("mode", MODES)
def test_text_that_one_rank_cannot_read_stops_all_ranks_with_a_checkpoint(
    mode: str, ended: dict[str, tuple[str, dict[str, Any]]], folder: Path
) -> None:
    error = f"error: rank 1: {UNREADABLE}; checkpoint step-00000009 is written: repair the text and --resume"
    assert ended[f"unreadable {mode}"][1]["code"] == 2
    lines = (folder / "stderr.txt").read_text(encoding="utf-8").splitlines()
    assert sum(line.endswith(error) and not line.startswith("rank 1: ") for line in lines) == len(MODES)
    assert [path.name for path in (folder / f"unreadable {mode}" / "checkpoints").iterdir()] == ["step-00000009"]


@pytest.mark.parametrize("mode", MODES)
def test_ranks_resume_beside_a_damaged_checkpoint_and_a_changed_corpus(
    mode: str, resumed: dict[str, tuple[str, dict[str, Any]]], folder: Path
) -> None:
    """The older checkpoint gives the same run. A changed corpus gives another one, and says so."""
    lines = {
        "damaged": "step-00000010 is damaged (state/rank-1.pt has 0 bytes, not ",
        "changed": f"--data {folder / f'changed {mode}.jsonl'} has changed; the result is not that of",
    }
    for name, expected in lines.items():
        said, outcome = resumed[f"{name} {mode}"]
        assert outcome["code"] == 0
        assert sum(expected in line for line in said.splitlines()) == 1, said
    expect_same_run(folder / f"damaged {mode}", folder / f"straight {HARMED[mode]}")


@pytest.mark.parametrize(("mode", "kilobytes"), [("ddp", 8), ("fsdp", 1200)])
def test_full_disk_ends_all_ranks_in_one_line_and_the_run_resumes_with_room(
    mode: str, kilobytes: int, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """The main rank alone writes metrics, and all ranks a checkpoint."""
    more = ["--batch-size", "2", "--tokens", "1280", "--data-parallel", mode]
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        arguments = command(source_folder, corpus, disk / "run", *more)
        done = torchrun("full_disk_ranks", *arguments)
        errors = {line.removeprefix("rank 1: ") for line in done.stderr.splitlines() if "error: " in line}
        assert len(errors) == 1, done.stderr[-3000:]  # a slow launcher lets the other rank repeat it
        assert "the disk is full (" in errors.pop()
        assert done.stderr.count("Traceback") == 1, done.stderr[-9000:]  # the launcher's
        grow(disk, 20_000)
        assert torchrun("efficientllm.runtime.start", "train", *arguments, "--resume").returncode == 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_source_is_alive_at_the_end(mode: str, ended: dict[str, tuple[str, dict[str, Any]]]) -> None:
    assert ended[f"stem {mode}"][1] == {"code": 0, "alive": [0], "of": 29}
