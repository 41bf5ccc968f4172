"""A signal in any phase of a run is answered there, and the resumed run is the uninterrupted one, to the bit."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import command, expect_same_run, run, without

from efficientllm.train.checkpoint import writer
from efficientllm.train.checkpoint.state import HashingWriter
from efficientllm.train.compute.stop_signal import StopSignal

PLAIN = ["--checkpoint-every", "0", "--eval-every", "5"]
RUNS: dict[str, list[str]] = {
    "samples": [
        *("--batch-size", "2", "--gradient-accumulation", "2", "--saliency", "taylor2", "--weight-update", "obs"),
        *("--qat", "q4_0"),
    ],
    "blocks": [*("--prune", "attention,ffn,blocks", "--block-tokens", "256", "--removals", "3")],
    "rows": [
        *("--prune", "attention,ffn,vocabulary", "--block-tokens", "256", "--vocabulary-tokens", "20000"),
        *("--target-ratio", "0.7", "--removals", "2", "--prune-start", "0.3", "--distill", "1"),
        *("--recover", "least-squares", "--recover-tokens", "512"),
    ],
    "kept rows": [
        *("--prune", "attention,ffn,vocabulary", "--vocabulary-rows", "380", "--vocabulary-tokens", "20000"),
        *("--target-ratio", "0.7", "--removals", "2", "--prune-start", "0.3", "--distill", "1"),
        *("--recover", "least-squares", "--recover-tokens", "512"),
    ],
}
"""Flags of runs that have every phase between them."""

STOPS = [
    *(("samples", name, at) for name, at in (("accumulate_gradients", 7), ("perplexity", 1), ("perplexity", 5))),
    ("samples", "<lambda>", 3),
    *(("blocks", name, at) for name, at in (("_of_batch", 1), ("_of_batch", -1), ("perplexity", -3))),
    *(("rows", name, at) for name, at in (("count_tokens", 1), ("_nats", 1), ("_nats", -1))),
    *(("rows", name, -1) for name in ("_of_batch", "_forward")),
    *(("kept rows", name, at) for name, at in (("count_tokens", 1), ("_forward", 3), ("_loop", -4))),
]
"""(run, function that asks whether to stop, which of the times that it asks; from the end where negative)."""


def arguments(name: str, source: Path, corpus: Path, folder: Path) -> list[str]:
    more = RUNS[name]
    given = command(source, corpus, folder, *PLAIN)
    for flag in ("--prune", "--target-ratio"):
        given = without(given, flag) if flag in more else given
    return [*given, *more, "--quality" if name == "samples" else "--no-quality"]


class Asked:
    """Counts who asks whether to stop, and sends the signal at one of these times."""

    def __init__(self) -> None:
        self.times = collections.Counter[str]()
        self.stop_at: tuple[str, int] | None = None

    def look(self, place: str) -> None:
        self.times[place] += 1
        if (place, self.times[place]) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found, check = Asked(), StopSignal.check

    def counting(self: StopSignal) -> None:
        frame: Any = sys._getframe(1)
        found.look((frame.f_back if frame.f_code.co_name == "check_alone" else frame).f_code.co_name)
        check(self)

    monkeypatch.setattr(StopSignal, "check", counting)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Path, collections.Counter[str]]]:
    """{run: (its folder, how often each function asked)} of the runs that were made so far, without a stop."""
    return {}


@pytest.fixture
def uninterrupted(
    whole: dict[str, tuple[Path, collections.Counter[str]]],
    asked: Asked,
    source_folder: Path,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    def folder_of(name: str) -> Path:
        if name not in whole:
            folder = tmp_path_factory.mktemp(name)  # pytest deletes the test's own when it has passed
            assert run(arguments(name, source_folder, corpus, folder)) == 0
            whole[name] = folder, asked.times.copy()
            asked.times.clear()
        return whole[name][0]

    return folder_of


@pytest.mark.slow
@pytest.mark.xdist_group("stopping")  # one whole run of each kind for all
@pytest.mark.parametrize(("name", "place", "time"), STOPS, ids=[f"{a}-{b}-{c}" for a, b, c in STOPS])
def test_a_run_that_is_stopped_anywhere_is_resumed_bit_identically(
    name: str,
    place: str,
    time: int,
    asked: Asked,
    whole: dict[str, tuple[Path, collections.Counter[str]]],
    uninterrupted: Callable[[str], Path],
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = uninterrupted(name)
    times = whole[name][1][place]
    asked.stop_at = (place, time if time > 0 else times + 1 + time)
    assert 0 < asked.stop_at[1] <= times
    given = arguments(name, source_folder, corpus, tmp_path / "stopped")
    assert run(given) == 130
    assert asked.times[place] == asked.stop_at[1]  # it was answered there
    assert "stopped by SIGTERM" in capsys.readouterr().err.strip().splitlines()[-1]
    asked.stop_at = None
    assert run([*given, "--resume"]) == 0
    expect_same_run(tmp_path / "stopped", straight)


def test_a_removal_that_cannot_be_saved_before_is_done_before_the_run_stops(
    asked: Asked,
    uninterrupted: Callable[[str], Path],
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk has no room for the checkpoint from before it."""
    straight = uninterrupted("rows")
    asked.stop_at = ("_forward", 2)
    given = arguments("rows", source_folder, corpus, tmp_path / "stopped")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        assert run(given) == 130
    assert asked.times["_forward"] > 2
    assert "checkpoint step-000000" in capsys.readouterr().err.strip().splitlines()[-1]
    asked.stop_at = None
    assert run([*given, "--resume"]) == 0
    expect_same_run(tmp_path / "stopped", straight)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("place", [(StopSignal, "check"), (HashingWriter, "write_data")], ids=["step", "checkpoint"])
def test_a_run_keeps_its_work_until_the_third_signal(
    count: int,
    place: tuple[Any, str],
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    original, folder, signals = getattr(*place), tmp_path / "run", [signal.SIGINT] * count
    written = folder / "checkpoints" / "step-00000002"

    def interrupted(*arguments: Any) -> Any:
        while signals and written.exists():
            os.kill(os.getpid(), signals.pop())
        return original(*arguments)

    monkeypatch.setattr(*place, interrupted)
    given = [*without(command(source_folder, corpus, folder, *PLAIN), "--checkpoint-every"), "--checkpoint-every", "2"]
    assert run(given) == 130
    said = capfd.readouterr().err.splitlines()
    assert said.count("SIGINT: stopping after the current step, then a checkpoint is written") == 1
    assert said.count("the run writes a checkpoint before it stops; a further signal gives it up") == 1
    is_kept, is_saving = count == 2, place[1] == "write_data"
    given_up = "interrupted: this checkpoint is not written, and earlier ones stay" if is_saving else "interrupted"
    newest = max(each.name for each in written.parent.iterdir())
    stopped = f"stopped by SIGINT; checkpoint {newest} is written; continue with --resume"
    assert said[-1] == (stopped if is_kept else given_up)
    assert (newest > written.name) == is_kept


def test_the_first_signal_is_named_while_the_main_thread_cannot_answer() -> None:
    """Send the signal from another thread while select waits, as a backward pass does."""
    arrived, said = os.pipe()
    tell = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    with StopSignal(say=lambda text: os.close(said)) as ours:
        tell.start()
        assert select.select([arrived], [], [], 30)[0]
    assert ours.name == "SIGTERM"
    os.close(arrived)


def test_ranks_stop_together() -> None:
    """A rank that got no signal stops where another one did, and only where all of them ask."""
    ours = StopSignal(any_rank=lambda flag: True)
    ours.check_alone()
    with ours.held(False), pytest.raises(KeyboardInterrupt, match="a signal to another rank"):
        ours.check()
    with ours.held():
        ours.check()


def test_a_signal_that_torchrun_repeats_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    for launched in (True, False):
        if launched:
            monkeypatch.setenv("WORLD_SIZE", "1")
        else:
            monkeypatch.delenv("WORLD_SIZE")
        with StopSignal() as ours:
            os.kill(os.getpid(), signal.SIGTERM)
            with contextlib.nullcontext() if launched else pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            assert ours.name == "SIGTERM"
