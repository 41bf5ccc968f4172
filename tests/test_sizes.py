"""--sizes: finished models of several sizes from one run."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import LAYERS, some_removal
from tiny import tiny_architecture, tiny_model
from training import command, expect_equal_weights, expect_same_run, metrics, run, without

import efficientllm.train.run as training_run
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.latency.shape import Workload
from efficientllm.train.family import fit
from efficientllm.train.family.later_steps import LaterSteps, add_later_steps, has_later_steps, link_later_steps
from efficientllm.train.loop.trainer import Trainer
from efficientllm.train.model.architecture import FAMILIES, Architecture
from efficientllm.train.model.irregular import architecture_of
from efficientllm.train.pruning.selection import all_groups, compose
from efficientllm.train.pruning.surgery import remove_groups

RUN = ["--removals", "4", "--prune-start", "0.2", "--prune-end", "0.6", "--lr-decay", "0.25"]
SIZES = ("0.8", "0.7", "0.6")


def sized(source: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    arguments = without(command(source, corpus, output), "--target-ratio")
    return [*arguments, *RUN, "--sizes", ",".join(SIZES), *more]


def folders(run_folder: Path) -> list[Path]:
    return [run_folder / "sizes" / "0.8", run_folder / "sizes" / "0.7", run_folder]


pytestmark = pytest.mark.xdist_group("sizes")  # one worker trains the family


@pytest.fixture(scope="module")
def family(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sizes") / "run"
    assert run(sized(source_folder, corpus, output)) == 0
    return output


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(folder) if "loss" in record]


def test_every_size_is_a_finished_run(family: Path, source_folder: Path) -> None:
    whole = Architecture.from_folder(source_folder).num_parameters
    previous = whole
    for size, folder in zip(SIZES, folders(family), strict=True):
        found = Architecture.from_folder(folder / "model").num_parameters
        assert previous * 0.75 < found <= float(size) * whole < previous
        previous = found
        assert not list(folder.glob("checkpoints/*"))
        assert not list(folder.glob("later-steps"))
        assert json.loads((folder / "architecture.json").read_text())["final"]
        rates = [record["learning_rate"] for record in steps(folder)]
        assert rates[-1] == pytest.approx(1e-4)  # the floor, a tenth of the peak
        assert max(rates) == rates[-6] == 1e-3  # the last quarter of 20 steps decays
    values = json.loads((family / "sizes.json").read_text())["sizes"]
    assert [each["size"] for each in values] == list(SIZES)
    assert [each["folder"] for each in values] == ["sizes/0.8", "sizes/0.7", "."]
    assert all(each["bytes"] and each["perplexity"] for each in values)
    assert values[0]["tokens"] < values[2]["tokens"]
    assert "| 0.7 |" in (family / "sizes.md").read_text()
    assert (family / "sizes.png").stat().st_size > 1000


def test_smallest_size_equals_that_of_a_single_run(
    family: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    assert run([*command(source_folder, corpus, tmp_path / "own"), *RUN]) == 0
    ours, theirs = ([{**each, "target": 0} for each in metrics(folder)] for folder in (tmp_path / "own", family))
    assert ours == theirs  # but for the targets, of which the shares are rounded
    expect_equal_weights(tmp_path / "own", family)


def test_a_larger_size_trains_as_the_run_did_until_its_branch(family: Path) -> None:
    trunk, branch = steps(family), steps(family / "sizes" / "0.7")
    number = len(branch) - 5
    assert [each["loss"] for each in trunk[:number]] == [each["loss"] for each in branch[:number]]
    assert trunk[number - 1].get("removed")
    assert not branch[number - 1].get("removed")
    assert trunk[number]["loss"] != branch[number]["loss"]


@pytest.mark.parametrize("kinds", [("kv_group", "ffn"), ("stem", "ffn"), ("attention_block", "ffn_block", "ffn")])
@pytest.mark.parametrize("model_family", FAMILIES)
def test_a_larger_size_gets_a_share_of_the_later_steps(
    model_family: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    """Steps after the branch count, removals and earlier steps do not. Compared in the shape of the smallest model."""
    trunk = tiny_model(tiny_architecture(model_family, LAYERS))
    survivors = all_groups(architecture_of(trunk.config))
    later, branch = LaterSteps(tmp_path), tmp_path / "sizes" / "0.7"

    def train(step: int) -> list[torch.Tensor]:
        later.begin(step, trunk, architecture_of(trunk.config), survivors)
        changes = [torch.randn(weight.shape) for weight in trunk.parameters()]
        for weight, change in zip(trunk.parameters(), changes, strict=True):
            weight.data += change
        later.end(trunk)
        return changes

    train(5)
    (branch / "checkpoints" / "step-00000010").mkdir(parents=True)
    larger, expected = copy.deepcopy(trunk), copy.deepcopy(trunk)
    shape, groups = architecture_of(trunk.config), survivors
    removals = []
    for step in (10, 20):
        removals.append(some_removal(architecture_of(trunk.config), kinds, units=3))
        survivors = compose(survivors, removals[-1].kept)
        for model in (trunk, expected):
            remove_groups(model, removals[-1])
        for weight, change in zip(expected.parameters(), train(step), strict=True):
            weight.data += 0.25 * change
    link_later_steps(tmp_path, branch)
    before = copy.deepcopy(larger)
    perplexities = iter([3.0, 2.0, math.nan, 4.0])  # of 0 and of each share
    assert add_later_steps(branch, larger, shape, groups, lambda: next(perplexities)) == 0.25
    changed = sum(int((new != old).sum()) for new, old in zip(larger.parameters(), before.parameters(), strict=True))
    assert changed <= removals[0].after.num_parameters  # groups that the run removed stay as they were
    for removal in removals:
        remove_groups(larger, removal)
    for (name, weight), wanted in zip(larger.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, msg=lambda text, name=name: f"{name}: {text}")
    perplexities = iter([2.0, 3.0, 3.0, 3.0])
    assert add_later_steps(branch, before, shape, groups, lambda: next(perplexities)) == 0


def test_single_run_has_no_later_steps(tmp_path: Path) -> None:
    link_later_steps(tmp_path, tmp_path / "branch")
    assert not has_later_steps(tmp_path / "branch")


def interrupted(*_: Any) -> list[str]:
    raise KeyboardInterrupt


def test_a_size_that_is_resumed_on_its_own_gets_the_later_steps(
    family: Path, source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "unfinished_sizes", interrupted)
        assert run(sized(source_folder, corpus, output)) == 130
    assert run(["--resume", "--output", str(output / "sizes" / "0.8")]) == 0
    assert run(["--resume", "--output", str(output)]) == 0
    for straight, resumed in zip(folders(family), folders(output), strict=True):
        expect_same_run(resumed, straight)


def test_a_stop_while_shares_are_tried_leaves_the_weights(tmp_path: Path) -> None:
    model = tiny_model(tiny_architecture())
    shape, later = architecture_of(model.config), LaterSteps(tmp_path)
    later.begin(10, model, shape, all_groups(shape))
    model.model.norm.weight.data += 1
    later.end(model)
    before = copy.deepcopy(model)

    def stopped() -> float:
        if not torch.equal(model.model.norm.weight, before.model.norm.weight):
            raise KeyboardInterrupt
        return 3.0

    with pytest.raises(KeyboardInterrupt):
        add_later_steps(tmp_path, model, shape, all_groups(shape), stopped)
    for weight, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, old)


def test_many_removals_write_no_later_steps(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LaterSteps, "begin", lambda *_: pytest.fail("later steps are written"))
    assert run(sized(source_folder, corpus, tmp_path / "run", "--removals", "0")) == 0


@pytest.mark.parametrize("where", ["between", "in a branch"])
def test_a_stopped_run_continues_bit_identically(
    where: str, family: Path, source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step
    stopped: list[int] = []

    def stopping(self: Trainer) -> dict[str, Any]:
        record = step(self)
        is_branch = self.plan.folder.parent.name == "sizes"
        is_here = is_branch if where == "in a branch" else self.progress.step == 11
        if not stopped and is_here:
            stopped.append(self.progress.step)
            self.stop_signal.name = "SIGTERM"
        return record

    monkeypatch.setattr(Trainer, "_step", stopping)
    arguments = sized(source_folder, corpus, tmp_path / "run")
    assert run(arguments) == 130
    assert len(stopped) == 1
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert run(["--resume", "--output", str(tmp_path / "moved")]) == 0
    for straight, resumed in zip(folders(family), folders(tmp_path / "moved"), strict=True):
        expect_same_run(resumed, straight)
    assert (tmp_path / "moved" / "sizes.json").read_text() == (family / "sizes.json").read_text()


def test_a_finished_run_is_replaced_only_on_request(
    family: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(family, tmp_path / "run")
    arguments = sized(source_folder, corpus, tmp_path / "run")
    assert run(arguments) == 2
    assert run([*arguments, "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err
    (tmp_path / "run" / "sizes" / "0.8" / "notes.txt").write_text("mine")
    assert run([*arguments, "--overwrite"]) == 2
    assert "sizes/0.8/notes.txt" in capsys.readouterr().err


def test_a_size_that_a_removal_jumps_over_is_named(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--sizes", "0.8,0.601,0.6", "--layout", "uniform"]  # a uniform unit is larger than a thousandth
    assert run([*sized(source_folder, corpus, tmp_path / "run"), *sizes]) == 0
    assert "size 0.601 has no model of its own" in capsys.readouterr().out
    assert "Size 0.601 has no model of its own" in (tmp_path / "run" / "sizes.md").read_text()


def test_a_run_that_was_killed_before_its_table_is_resumed(
    family: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(family, tmp_path / "run")
    (tmp_path / "run" / "sizes.json").unlink()
    left = tmp_path / "run" / "sizes" / "0.8" / "checkpoints" / "step-00000010"
    left.mkdir(parents=True)
    assert run_command(fit.body, [str(tmp_path / "run"), "--max-bytes", "1GB"]) == 2
    assert "not all sizes are finished; first run efficientllm-train --resume" in capsys.readouterr().err
    assert run([*sized(source_folder, corpus, tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "sizes.json").read_text() == (family / "sizes.json").read_text()
    assert not left.exists()


def test_a_branch_without_its_checkpoint_is_not_trained_from_the_source(
    family: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(family, tmp_path / "run")
    (tmp_path / "run" / "sizes" / ".0.8.efficientllm-lock").touch()  # of a killed run
    (tmp_path / "run" / "sizes" / "0.8" / "architecture.json").unlink()
    (tmp_path / "run" / "sizes.json").unlink()
    arguments = sized(source_folder, corpus, tmp_path / "run")
    assert run([*arguments, "--resume"]) == 2
    assert "0.8 has no undamaged checkpoint; delete that folder" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "sizes" / "0.8")
    assert run([*arguments, "--resume"]) == 0
    assert run([*arguments, "--overwrite"]) == 0


@pytest.fixture
def ordered(family: Path, tmp_path: Path) -> Path:
    """The family with perplexities that fall with size."""
    return with_figures(family, tmp_path / "ordered", perplexity=[10.0, 20.0, 30.0])


def with_figures(family: Path, folder: Path, **columns: list[float]) -> Path:
    shutil.copytree(family, folder)
    rows = json.loads((folder / "sizes.json").read_text())["sizes"]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    (folder / "sizes.json").write_text(json.dumps({"sizes": rows}))
    return folder


def test_a_device_gets_the_best_size_within_its_limits(
    family: Path, ordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = json.loads((family / "sizes.json").read_text())["sizes"]
    limits = (sizes[0]["bytes"], sizes[0]["bytes"] - 1, sizes[2]["bytes"])
    for limit, size, folder in zip(limits, SIZES, folders(ordered), strict=True):
        assert run_command(fit.body, [str(ordered), "--max-bytes", str(limit)]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"size {size}: ")
        assert f"efficientllm-export {folder} --target gguf" in shown
    assert run_command(fit.body, [str(family), "--max-bytes", "1kB"]) == 2
    assert "none of its sizes 0.8, 0.7, 0.6 is within the limits" in capsys.readouterr().err
    scored = with_figures(family, tmp_path / "scored", score=[0.5, 0.7, 0.7], stderr=[0.1] * 3)
    assert run_command(fit.body, [str(scored), "--max-bytes", "1GB"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("size 0.6: ")  # as good as 0.7 and smaller
    assert second.startswith("also within the limits: 0.8 (")
    assert "score 0.500" in second


def test_memory_limits_the_sizes_by_an_estimate(ordered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fit.body, [str(ordered), "--max-memory", "1GB"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("size 0.8: ")
    assert "MB of memory (estimated)" in first
    assert run_command(fit.body, [str(ordered), "--max-memory", "50MB"]) == 2
    assert run_command(fit.body, ["demo", "--max-bytes", "1GB", "--max-memory", "1GB"]) == 2
    assert "demo is no run with --sizes; give the --output" in capsys.readouterr().err


def test_a_longer_workload_needs_more_memory(family: Path) -> None:
    shape = Architecture.from_folder(family / "model")
    short, long = (fit.serving_memory(shape, 1e6, Workload.at_depth(depth)) for depth in (99, 1099))
    heads = sum(layer.num_key_value_heads for layer in shape.layers)
    assert long - short == 1000 * heads * shape.head_dim * 2 * 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sizes", "0.8,0.9"], "--sizes 0.8,0.9: must fall from left to right"),
        (["--sizes", "0.8,40MB"], "--sizes 0.8,40MB: have different units; give shares (0.8)"),
        (["--sizes", "big"], "--sizes: 'big' is no size; give shares (0.8)"),
        (["--target-ratio", "0.5"], "--sizes and --target-ratio are both given; choose one"),
        (["--sizes", "8ms,6ms"], "--target-latency 8ms: needs --device-profile FILE"),
        (["--lr-schedule", "cosine"], "use --lr-schedule wsd"),
        (["--prune-end", "0.8"], "use --prune-end 0.75 or less"),
        (["--sizes", "50,40"], "'50' is no size; give shares"),
        (["--sizes", "1000M,0.1M"], "is larger than the source's"),
    ],
)
def test_bad_input_gives_one_line(
    more: list[str], message: str, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*sized(source_folder, corpus, tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
