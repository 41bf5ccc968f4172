"""The whole study on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from priced import tiny_profile, tiny_time
from pruning import random_scores
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.config.sections import TrainConfig
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.pruning.measures import PARAMETERS
from efficientllm.train.pruning.plan import make_pruning_plan
from efficientllm.train.pruning.selection import select_removal
from research.study import law
from research.study.arms import ARMS
from research.study.cli import body
from research.study.depth import best_contiguous, scaled, without_layers
from research.study.study import Study, StudyConfig, jobs, target_parameters
from research.token_law import training_flops

BY_PARAMETERS = StudyConfig().arms
SOME = ("source", "recover", "random")
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
    assert len(results) == len(BY_PARAMETERS) + 3 * len(SOME[1:])
    for result in results:
        if ARMS[result["arm"]].trains:
            assert result["tokens"] == 640
        if result["keep"] < 1 and result["arm"] != "scaled":  # whose heads of two channels fewer are coarse here
            target = target_parameters(source, result["keep"])
            unit = 16 * 3 * source.hidden_size  # of FFN channels; one of every layer where layers are alike
            assert target - unit <= result["parameters"] <= target, result["arm"]


@pytest.mark.slow
def test_each_arm_changes_its_own_setting(page: Path) -> None:
    results = {(r["arm"], r["keep"], r["seed"]): r for r in results_of(page)}
    flops = {key: result["flops"] for key, result in results.items()}
    # per final parameter: two arms may end a unit apart
    cost = {key: result["flops"] / result["parameters"] for key, result in results.items()}
    assert flops["source", 1.0, 0] == 0
    assert cost["scratch", 0.6, 0] < cost["one-shot-fisher", 0.6, 0] < cost["continuous", 0.6, 0]
    assert flops["source-trained", 1.0, 0] < flops["continuous", 0.6, 0]
    values = {
        r["arm"]: r["evaluation"]["perplexity"]["docs"]["perplexity"]
        for r in results_of(page)
        if r["seed"] == 0 and r["keep"] in (0.6, 1.0)
    }
    assert len(set(values.values())) == len(BY_PARAMETERS)


@pytest.mark.slow
def test_page_names_commit_tokens_seeds_and_shows_its_figures(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("on the same 640 tokens of", "Commit ", "-20% of the non-embedding", "-40% of the non-embedding"):
        assert part in text
    assert str(page.parent) not in text
    assert str(page.parent) not in (page.with_suffix("") / "results.json").read_text(encoding="utf-8")
    assert {file.name for file in page.with_suffix("").iterdir()} == {
        "results.json",
        *(f"{kind}-{keep}.png" for kind in ("perplexity", "architecture") for keep in ("0.8", "0.6")),
    }


@pytest.mark.slow
def test_page_compares_baselines_without_the_main_arm(page: Path, arguments: list[str], tmp_path: Path) -> None:
    report = tmp_path / "criteria.md"
    only = ["--arms", "source,random", "--keep", "0.8", "--report", str(report), "--report-only"]
    assert run_command(body, [*arguments[:-2], *only]) == 0
    report.write_text(f"{report.read_text(encoding='utf-8')}<!-- notes -->\nBy hand.\n", encoding="utf-8")
    assert run_command(body, [*arguments[:-2], *only]) == 0
    assert report.read_text(encoding="utf-8").endswith("<!-- notes -->\nBy hand.\n")
    rows = [line for line in report.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {ARMS[arm].title}" for arm in ("source", "random")]
    assert {file.name for file in (tmp_path / "criteria").iterdir()} == {"results.json", "perplexity-0.8.png"}


@pytest.mark.slow
def test_second_call_repeats_only_missing_arms(
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
    arms = ["continuous", "recover-uniform", "latency-blocks", "depth"]
    more = ["--device-profile", str(profile), "--keep", "0.7", "--seeds", "1", "--arms", ",".join(arms)]
    paths = ["--output", str(tmp_path / "runs"), "--report", str(tmp_path / "results.md")]
    assert run_command(body, [*arguments[:-4], *more, *paths]) == 0
    found = results_of(tmp_path / "results.md")
    results = {result["arm"]: result for result in found}
    assert list(results) == arms
    shape = Architecture.from_folder(source_folder)
    source, source_layer = tiny_time().measure.of(shape), shape.layers[0]
    for result in found:
        shape = Architecture.from_dict(result["architecture"])
        assert result["ms"] == pytest.approx(tiny_time().measure.of(shape))
        assert 0.4 * source < result["ms"] <= 0.7 * source
    cut = [layer for layer in Architecture.from_dict(results["depth"]["architecture"]).layers if layer != source_layer]
    assert len(cut) == 1
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "-30% of the time of depth=512" in text
    assert "All arms end at the same predicted time of depth=512 on local" in text
    assert "predicted ms" in text


def test_every_criterion_is_an_arm() -> None:
    name = "one-shot-random"
    assert name not in ARMS
    config = StudyConfig(arms=("recover", name), keep=("0.5",))
    try:
        assert [job.name for job in jobs(config)] == ["0.5/recover-s0", f"0.5/{name}-s0"]
        assert ARMS[name].configure(TrainConfig()).pruning.saliency == "random"
    finally:
        del ARMS[name]
    with pytest.raises(UsageError, match="--arms one-shot-nothing: unknown; known: taylor1"):
        StudyConfig(arms=("one-shot-nothing",))
    with pytest.raises(UsageError, match=r"--arms sorce: .*one-shot-CRITERION; did you mean source"):
        StudyConfig(arms=("sorce",))


def test_arms_for_a_device_need_one() -> None:
    with pytest.raises(UsageError, match="--arms latency-blocks: needs --device-profile"):
        StudyConfig(arms=("recover", "latency-blocks"))


def test_profiles_are_read_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json does not exist"):
        Study(
            StudyConfig(
                device_profile=str(tmp_path / "none.json"), arms=("latency-blocks",), output=str(tmp_path / "study")
            )
        )
    assert not (tmp_path / "study").exists()


class CentredProbe:
    """Loses least without the layers around 1.2."""

    def losses(self, absences: list[Any]) -> list[float]:
        return [sum(abs(layer - 1.2) for layer, _ in absence) for absence in absences]


def best_of(source: Architecture, target: float) -> Architecture:
    return best_contiguous(source, CentredProbe(), PARAMETERS, target)  # type: ignore[arg-type]


def test_the_best_contiguous_layers_equal_those_without_which_least_changes() -> None:
    source = tiny_architecture(layers=(LayerShape(4, 2, 96),) * 6)
    layer = source.attention_parameters(source.layers[0]) + source.ffn_parameters(source.layers[0])
    assert best_of(source, source.num_parameters - layer) == without_layers(source, range(1, 2))
    assert best_of(source, source.num_parameters - 3 * layer) == without_layers(source, range(3))


def test_depth_ends_with_a_part_of_a_layer() -> None:
    source = tiny_architecture(layers=(LayerShape(4, 2, 96),) * 6)
    channels = 48 * 3 * source.hidden_size  # parameters of half of an FFN
    without = best_of(source, source.num_parameters - source.attention_parameters(source.layers[0]) - channels)
    assert without.layers[1] == LayerShape(0, 0, 48)
    without = best_of(source, source.num_parameters - channels)
    assert without.layers[1] == LayerShape(4, 2, 48)


REAL = LayerShape(9, 3, 1536)
"""A layer of SmolLM2-135M."""
UNEQUAL = tuple(LayerShape(3 * groups, groups, width) for groups, width in ((3, 1536), (2, 1056), (1, 1300)))


def real_source(layers: tuple[LayerShape, ...]) -> Architecture:
    return replace(tiny_architecture(layers=layers, hidden_size=576, head_dim=64), vocab_size=49152)


@pytest.mark.parametrize("keep", [0.8, 0.5])
@pytest.mark.parametrize("layers", [(REAL,) * 30, UNEQUAL * 10], ids=["equal", "unequal"])
def test_arms_end_within_a_500th_of_one_size_on_real_shapes(layers: tuple[LayerShape, ...], keep: float) -> None:
    source = real_source(layers)
    target = target_parameters(source, keep)
    ends = {"depth": best_of(source, target)}
    if source.is_uniform:
        ends["scaled"] = scaled(source, target)
    for name in ("recover", "recover-uniform"):
        settings = ARMS[name].configure(TrainConfig(pruning=PruneConfig(target_params=target))).pruning
        seeds = 5 if settings.layout != "uniform" else int(source.is_uniform)  # the uniform ranking takes seconds
        for seed in range(seeds):
            plan = make_pruning_plan(settings, source, 0)
            assert plan is not None
            # heads as dear as channels a parameter, so that either may be the last
            scores = random_scores(source, seed)
            scores = {kind: [vector * (164 if kind != "ffn" else 1) for vector in scores[kind]] for kind in scores}
            ends[f"{name} {seed}"] = select_removal(source, scores, plan.rules, target, final_target=target).after
    for name, shape in ends.items():
        assert shape.num_parameters == pytest.approx(target, rel=0.002), name


def test_a_scaled_source_has_its_proportions() -> None:
    shape = scaled(real_source((REAL,) * 30), 81_413_280)
    assert (shape.hidden_size, shape.head_dim, shape.layers) == (432, 48, (LayerShape(9, 3, 1163),) * 30)


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


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--arms", "ours", "--arms ours: is not one of"), ("--keep", "1.5", "--keep 1.5"), ("--seeds", "0", "--seeds 0")],
)
def test_bad_settings_give_one_line(
    flag: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(body, ["--output", str(tmp_path / "runs"), flag, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def made_study(folder: Path, tokens: int, learning_rate: float, gaps: list[float]) -> str:
    """A study whose arm `recover` is these nats above the source, one seed each."""
    rows = json.loads((Path(__file__).parents[2] / "docs/results/results.json").read_text(encoding="utf-8"))["results"]
    source = next(row for row in rows if row["arm"] == "source")
    texts = source["evaluation"]["quality"]["texts"]
    found = {"source-s0": source}
    for seed, gap in enumerate(gaps):
        higher = {kind: [nats + gap for nats in documents] for kind, documents in texts.items()}
        quality = source["evaluation"]["quality"] | {"texts": higher}
        ends = {"arm": "recover", "keep": 0.5, "seed": seed, "tokens": tokens, "parameters": 100_000_000}
        found[f"0.5/recover-s{seed}"] = source | ends | {"evaluation": source["evaluation"] | {"quality": quality}}
    for name, row in found.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "result.json").write_text(json.dumps(row))
    (folder / "settings.json").write_text(json.dumps({"learning_rate": learning_rate}))
    return str(folder)


def test_the_law_predicts_longer_runs_from_the_better_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def gap(tokens: int) -> float:
        return 9 * tokens**-0.2

    lengths = (10_000, 40_000, 160_000)
    studies = [made_study(tmp_path / f"{each}", each, 2e-4, [0.98 * gap(each), 1.02 * gap(each)]) for each in lengths]
    studies += [made_study(tmp_path / f"{each}-high", each, 1e-3, [1.5 * gap(each)]) for each in lengths]
    studies.append(made_study(tmp_path / "longest", 640_000, 2e-4, [2 * gap(640_000)]))
    rows, picture = tmp_path / "tokens.json", tmp_path / "tokens.png"
    more = ["--fit-through", "160000", "--predict", "640000", "--output", str(rows), "--picture", str(picture)]
    assert run_command(law.body, [*studies, *more]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert f"{gap(10_000):.3f} (2 at 0.0002)" in row
    assert "* tokens ^ -0.200" in row  # the longest run is left out
    low, high = map(float, row.split(f"{gap(640_000):.3f} (")[1].split(")")[0].split("-"))
    assert 0.8 * gap(640_000) < low < gap(640_000) < high < 1.2 * gap(640_000)
    assert run_command(law.body, [str(rows), studies[0], *more]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == row
    assert len(json.loads(rows.read_text())["runs"]) == 3 * 3 + 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run_command(law.body, [str(tmp_path)]) == 2
    assert "is no study with the untouched source" in capsys.readouterr().err
