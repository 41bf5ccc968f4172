"""The whole study on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from priced import cheap_attention_profile, tiny_profile, tiny_time
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.config.sections import TrainConfig
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.pruning.measures import PARAMETERS
from research.study.arms import ARMS
from research.study.cli import body
from research.study.depth import best_contiguous, without_layers
from research.study.overlap import jaccard_of_removed
from research.study.study import Study, StudyConfig, jobs, target_parameters
from research.token_law import training_flops

BY_PARAMETERS = StudyConfig().arms
SOME = ("source", "taylor1", "distill", "random")
"""Arms that are run at two shares with two seeds; the others at one, once."""

pytestmark = pytest.mark.xdist_group("study")  # one run of it for all


@pytest.fixture(scope="module")
def arguments(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("study")
    return [
        *("--source", str(source_folder), "--data", str(corpus), "--text", f"docs={corpus}", "--text-tokens", "256"),
        *("--tokens", "640", "--sequence-length", "32", "--batch-size", "1", "--width-multiple", "16"),
        *("--tasks", "none", "--device", "cpu", "--eval-dtype", "float32", "--min-context", "4"),
        *("--keep", "0.8,0.6", "--seeds", "2", "--arms", ",".join(SOME)),
        *("--output", str(folder / "runs"), "--report", str(folder / "results.md")),
    ]


@pytest.fixture(scope="module")
def page(arguments: list[str]) -> Path:
    everything = ["--arms", ",".join(BY_PARAMETERS)]
    assert run_command(body, [*arguments[:-2], "--keep", "0.6", "--seeds", "1", *everything]) == 0
    assert run_command(body, arguments[:-2]) == 0  # one page at the end instead of one after every run
    assert run_command(body, [*arguments, *everything, "--report-only"]) == 0
    return Path(arguments[-1])


def results_of(page: Path) -> list[dict[str, Any]]:
    return json.loads((page.with_suffix("") / "results.json").read_text(encoding="utf-8"))["results"]


@pytest.mark.slow
def test_every_arm_ends_at_the_same_size_after_the_same_tokens(page: Path, source_folder: Path) -> None:
    source = Architecture.from_hf_config(json.loads((source_folder / "config.json").read_text(encoding="utf-8")))
    results = results_of(page)
    repeated = sum(ARMS[name].is_repeated for name in SOME)
    assert len(results) == len(BY_PARAMETERS) + len(SOME) - 1 + 2 * repeated
    for result in results:
        if ARMS[result["arm"]].trains:
            assert result["tokens"] == 640
        if result["keep"] < 1:
            target = target_parameters(source, result["keep"])
            head_group = source.attention_parameters(source.layers[0]) // source.layers[0].num_key_value_heads
            unit = max(16 * 3 * source.hidden_size, head_group)
            unit *= len(source.layers) if result["arm"] in ("uniform", "recover-uniform") else 1
            unit = source.num_parameters // len(source.layers) if result["arm"] == "depth" else unit
            assert target - unit <= result["parameters"] <= target


@pytest.mark.slow
def test_arms_differ_in_what_they_change(page: Path) -> None:
    results = {(r["arm"], r["keep"], r["seed"]): r for r in results_of(page)}
    flops = {key: result["flops"] for key, result in results.items()}
    # per final parameter: two arms may end a unit apart
    cost = {key: result["flops"] / result["parameters"] for key, result in results.items()}
    assert flops["source", 1.0, 0] == 0
    assert cost["scratch", 0.6, 0] < cost["one-shot-taylor", 0.6, 0] < cost["taylor1", 0.6, 0]
    assert flops["taylor1", 0.6, 0] < flops["source-trained", 1.0, 0] < flops["distill", 0.8, 0]
    values = {
        r["arm"]: r["evaluation"]["perplexity"]["docs"]["perplexity"]
        for r in results_of(page)
        if r["seed"] == 0 and r["keep"] in (0.6, 1.0) and r["arm"] != "taylor2"  # picks taylor1's groups in this model
    }
    assert len(set(values.values())) == len(BY_PARAMETERS) - 1


@pytest.mark.slow
def test_page_names_commit_tokens_seeds_and_shows_its_figures(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in (
        "on the same 640 tokens of",
        "Commit ",
        "-20% of the non-embedding",
        "-40% of the non-embedding",
        "| seeds alike |",
        "pairs of seeds",
    ):
        assert part in text
    assert str(page.parent) not in text
    assert str(page.parent) not in (page.with_suffix("") / "results.json").read_text(encoding="utf-8")
    assert {file.name for file in page.with_suffix("").iterdir()} == {
        "results.json",
        *(f"{kind}-{keep}.png" for kind in ("perplexity", "architecture") for keep in ("0.8", "0.6")),
    }


@pytest.mark.slow
def test_a_page_compares_baselines_without_an_arm_of_ours(page: Path, arguments: list[str], tmp_path: Path) -> None:
    report = tmp_path / "criteria.md"
    only = ["--arms", "source,random", "--keep", "0.8", "--report", str(report), "--report-only"]
    assert run_command(body, [*arguments[:-2], *only]) == 0
    rows = [line for line in report.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {ARMS[arm].title}" for arm in ("source", "random")]
    assert {file.name for file in (tmp_path / "criteria").iterdir()} == {"results.json", "perplexity-0.8.png"}


@pytest.mark.slow
def test_a_second_call_repeats_only_what_is_missing(
    page: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Path(arguments[arguments.index("--output") + 1])
    before = results_of(page)
    (runs / "0.8" / "random-s0" / "result.json").unlink()
    assert run_command(body, arguments) == 0
    done = [line for line in capsys.readouterr().out.splitlines() if " done in " in line]
    assert [line.split()[1] for line in done] == ["0.8/random-s0"]

    def numbers(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
        several = [result for result in results if result["arm"] in SOME and result["keep"] != 0.6]
        measured = {tuple(r[key] for key in ("arm", "keep", "seed")): r["evaluation"] for r in several}
        return {key: evaluation["perplexity"]["docs"]["perplexity"] for key, evaluation in measured.items()}

    assert numbers(results_of(page)) == pytest.approx(numbers(before))


@pytest.mark.slow
def test_a_folder_holds_one_study(page: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(body, [*arguments, "--tokens", "704"]) == 2
    assert "holds a study with another --tokens" in capsys.readouterr().err
    assert run_command(body, [*arguments, "--report-only"]) == 0
    assert " behind 4 others" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_arms_for_a_device_end_at_the_same_time(arguments: list[str], source_folder: Path, tmp_path: Path) -> None:
    profile = tmp_path / "device.json"
    tiny_profile().save(profile)
    other = tmp_path / "other.json"
    cheap_attention_profile().save(other)
    arms = ["taylor1", "uniform", "latency", "latency-blocks", "depth"]
    more = ["--device-profile", str(profile), "--keep", "0.7", "--seeds", "1", "--arms", ",".join(arms)]
    more += ["--ranking-profile", str(other)]
    paths = ["--output", str(tmp_path / "runs"), "--report", str(tmp_path / "results.md")]
    assert run_command(body, [*arguments[:-4], *more, *paths]) == 0
    found = results_of(tmp_path / "results.md")
    results = {result["arm"]: result for result in found if result["ranked_for"] is None}
    assert list(results) == arms
    elsewhere = [result for result in found if result["ranked_for"] is not None]
    assert [(one["arm"], one["ranked_for"]) for one in elsewhere] == [("latency", "other"), ("latency-blocks", "other")]
    source = tiny_time().measure.of(Architecture.from_folder(source_folder))
    for result in found:
        shape = Architecture.from_dict(result["architecture"])
        assert result["ms"] == pytest.approx(tiny_time().measure.of(shape))
        assert 0.4 * source < result["ms"] <= 0.7 * source
    gone = [layer == LayerShape(0, 0, 0) for layer in Architecture.from_dict(results["depth"]["architecture"]).layers]
    assert sum(gone) == 1
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "-30% of the time of depth=512" in text
    assert "All arms end at the same predicted time of depth=512 on local" in text
    assert "predicted ms" in text
    assert "Groups ranked for another device" in text
    assert text.count("| other |") == 2


def test_every_criterion_is_an_arm() -> None:
    name = "one-shot-random"
    assert name not in ARMS
    config = StudyConfig(arms=("taylor1", name), keep=("0.5",))
    try:
        assert [job.name for job in jobs(config)] == ["0.5/taylor1-s0", f"0.5/{name}-s0"]
        assert ARMS[name].configure(TrainConfig()).pruning.saliency == "random"
    finally:
        del ARMS[name]
    with pytest.raises(UsageError, match="--saliency nothing: unknown; known: taylor1"):
        StudyConfig(arms=("one-shot-nothing",))


def test_arms_for_a_device_need_one() -> None:
    with pytest.raises(UsageError, match="--arms latency: needs --device-profile"):
        StudyConfig(arms=("taylor1", "latency"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"--ranking-profile a/x\.json: needs --device-profile"),
        ({"device_profile": "own.json"}, "is for arms that rank by milliseconds; add latency-blocks to --arms"),
        ({"device_profile": "own.json", "arms": ("latency",)}, "another one has this name; rename it"),
    ],
)
def test_ranking_profiles_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StudyConfig(ranking_profile=("a/x.json", "b/x.json"), **settings)


def test_profiles_are_read_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json does not exist"):
        Study(
            StudyConfig(device_profile=str(tmp_path / "none.json"), arms=("latency",), output=str(tmp_path / "study"))
        )
    assert not (tmp_path / "study").exists()


def test_ranking_profiles_are_told_apart_by_their_devices(tmp_path: Path) -> None:
    for name in ("own", "one", "two"):
        tiny_profile().save(tmp_path / f"{name}.json")
    own, one, two = (str(tmp_path / f"{name}.json") for name in ("own", "one", "two"))
    with pytest.raises(UsageError, match=r"one\.json and .*two\.json are both of 'local'; measure one of them under"):
        Study(
            StudyConfig(
                device_profile=own, ranking_profile=(one, two), arms=("latency",), output=str(tmp_path / "study")
            )
        )
    assert not (tmp_path / "study").exists()


def test_the_best_contiguous_layers_are_those_without_which_least_changes() -> None:
    """Exhaustive over their places; no fewer would do."""

    class Probe:
        def losses(self, absences: list[Any]) -> list[float]:
            return [abs(min(layer for layer, _ in absence) - 1.2) for absence in absences]

    source = tiny_architecture(layers=(LayerShape(4, 2, 96),) * 6)
    target = source.num_parameters - 1.5 * source.attention_parameters(source.layers[0])
    shape = best_contiguous(source, Probe(), PARAMETERS, target)  # type: ignore[arg-type]
    assert shape == without_layers(source, 1, 1)
    target = source.embedding_parameters + 3.5 * (source.num_parameters - source.embedding_parameters) / 6
    shape = best_contiguous(source, Probe(), PARAMETERS, target)  # type: ignore[arg-type]
    assert shape == without_layers(source, 1, 3)


def test_first_seed_of_everything_comes_first() -> None:
    todo = jobs(StudyConfig(keep=("0.5", "0.8"), seeds=3))
    seeds = [job.seed for job in todo]
    assert seeds == sorted(seeds)
    assert len({job.name for job in todo}) == len(todo)
    assert sum(job.arm == "source" for job in todo) == 1


def test_flops_follow_the_shrinking_model() -> None:
    source = Architecture.from_dict(
        {
            "family": "llama",
            "hidden_size": 8,
            "head_dim": 4,
            "vocab_size": 10,
            "tie_word_embeddings": False,
            "qkv_bias": False,
            "qk_norm": False,
            "num_attention_heads": [2],
            "num_key_value_heads": [1],
            "intermediate_size": [16],
        }
    )
    records = [{"loss": 1.0, "tokens": 10, "parameters": 700}, {"loss": 1.0, "tokens": 30, "parameters": 580}]
    table = 10 * 8
    plain = 6 * (10 * (900 - table) + 20 * (700 - table))
    assert training_flops(records, 900, source, with_teacher=False) == plain
    assert training_flops(records, 900, source, with_teacher=True) == plain + 30 * 2 * (source.num_parameters - table)


def test_overlap_counts_what_is_gone_from_both() -> None:
    source = Architecture.from_dict(
        {
            "family": "llama",
            "hidden_size": 2,
            "head_dim": 4,
            "vocab_size": 10,
            "tie_word_embeddings": True,
            "qkv_bias": False,
            "qk_norm": False,
            "num_attention_heads": [2],
            "num_key_value_heads": [2],
            "intermediate_size": [4],
        }
    )
    one = {"ffn": [[0, 1]], "query_head": [[0, 1]], "kv_group": [[0, 1]], "stem": [[0, 1]]}
    other = {"ffn": [[1, 3]], "query_head": [[0]], "kv_group": [[0]], "stem": [[0, 1]]}
    assert jaccard_of_removed(one, other, source) == 1 / 4
    assert jaccard_of_removed(one, one, source) == 1.0


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--arms", "ours", "--arms ours: is not one of"), ("--keep", "1.5", "--keep 1.5"), ("--seeds", "0", "--seeds 0")],
)
def test_bad_settings_are_one_line(
    flag: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(body, ["--output", str(tmp_path / "runs"), flag, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
