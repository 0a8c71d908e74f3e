"""A run of stages is the chain of its runs, in one adapter, and resumes in the right stage bit for bit."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from flamingo_ft import cli
from flamingo_ft.adapters import load_adapter
from flamingo_ft.adapters.files import read_config, read_tensors
from flamingo_ft.check.stages import check_recipe
from flamingo_ft.config import load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.plan.planner import plan_memory
from flamingo_ft.plan.stage_plans import make_stage_plans
from flamingo_ft.report import write_report
from flamingo_ft.report.run_folder import RunFolder
from flamingo_ft.training.checkpoint_folders import MANIFEST, write_manifest
from flamingo_ft.training.train import train
from tests import killing, regimes

STAGES = [
    {"name": "bridge", "train": {"max_steps": 3}},
    {
        "name": "lora",
        "trainable": {"perceiver": False, "cross_attention": False},
        "lora": {"language": {"r": 4, "lora_alpha": 8}, "cross_attention": {"r": 2}, "lora_dropout": 0.3},
        "data": {"train": [{"path": "train.jsonl"}, {"path": "text.jsonl"}]},
        "train": {"max_steps": 4, "save_steps": 2},
    },
]
WEIGHTS = "adapter_model.safetensors"
TEXT_ROW = {
    "messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
}


def write_recipe(folder: Path) -> None:
    """Write the small recipe with two stages, the second with text-only rows, and all of its data."""
    regimes.write_run(folder)
    (folder / "text.jsonl").write_text(json.dumps(TEXT_ROW))
    recipe = yaml.safe_load(regimes.RECIPE)
    recipe["data"]["eval"] = [{"path": "train.jsonl"}, {"path": "text.jsonl"}]
    recipe["eval"] = {"batch_size": 2, "max_new_tokens": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"stages": STAGES}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe("./recipe.yaml"))
    return folder


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of that folder, as the current directory: the run has been moved."""
    shutil.copytree(whole, tmp_path / "copied")
    monkeypatch.chdir(tmp_path / "copied")
    return tmp_path / "copied"


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def same_model(one: Path, other: Path) -> bool:
    models = [load_adapter(folder)[0].state_dict() for folder in (one, other)]
    return models[0].keys() == models[1].keys() and all(
        tensor.equal(models[1][name]) and tensor.dtype == models[1][name].dtype
        for name, tensor in models[0].items()
    )


# --- one adapter ---


def test_two_stages_equal_two_runs_chained_by_init_from(whole, tmp_path, monkeypatch):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    common = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del common["stages"]
    for stage, start in zip(STAGES, (None, "first"), strict=True):
        name = "first" if start is None else "second"
        run = common | {key: common.get(key, {}) | values for key, values in stage.items() if key != "name"}
        run["train"] = {**run["train"], "output_dir": name}
        run["model"] = run["model"] | ({"init_from": start} if start else {})
        Path(f"{name}.yaml").write_text(yaml.safe_dump(run))
        train(load_recipe(f"./{name}.yaml"))
    assert same_model(tmp_path / "second", whole / "run")
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (whole / "run/1-bridge" / WEIGHTS).read_bytes()


def test_the_final_adapter_needs_no_stage(whole, copied):
    shutil.rmtree(copied / "run" / "1-bridge")
    shutil.rmtree(copied / "run" / "2-lora")
    assert same_model(copied / "run", whole / "run" / "2-lora")
    config = read_config(copied / "run")
    assert config.bridge_init is None and len(config.adapter_parts) == 3
    assert cli.main(["generate", "run", "--image", "0.png", "--prompt", "Which shade?"]) == 0
    assert cli.main(["eval", "run"]) == 0


@pytest.mark.slow
def test_the_final_adapter_merges_and_is_what_a_further_run_starts_from(copied):
    shutil.rmtree(copied / "run" / "1-bridge")
    assert cli.main(["merge", "run", "merged", "--samples", "2", "--margin", "10"]) == 0
    start = [
        "model.init_from=run",
        "train.output_dir=further",
        "train.max_steps=1",
        *lora_of_the_last_stage(),
    ]
    Path("further.yaml").write_text(regimes.RECIPE)
    assert cli.main(["train", "./further.yaml", *start]) == 0


def lora_of_the_last_stage() -> list[str]:
    lora = json.dumps(STAGES[1]["lora"])
    return [f"lora={lora}", "trainable.cross_attention=false"]


@pytest.mark.slow
def test_the_base_of_all_stages_stays_outside_the_adapter(copied, monkeypatch):
    (copied / "earlier").mkdir()
    regimes.write_run(copied / "earlier")
    with monkeypatch.context() as patch:
        patch.chdir("earlier")
        regimes.write_start(copied / "start")
    overrides = ["model.init_from=start", "stages.0.trainable.perceiver=false", "train.max_steps=1"]
    train(load_recipe("./recipe.yaml", [*overrides, "train.output_dir=on_start"]))
    config = read_config(copied / "on_start")
    assert Path(config.bridge_init["path"]).name == "start"
    assert config.adapter_parts == ["cross_attention", "new_tokens"]
    assert not any(name.startswith("perceiver") for name in read_tensors(copied / "on_start"))
    assert same_model(copied / "on_start", copied / "on_start" / "2-lora")


# --- what is written ---


def test_the_metrics_are_the_last_stages_with_the_scores_before_the_first(whole):
    metrics, last = metrics_of(whole / "run"), metrics_of(whole / "run" / "2-lora")
    first = metrics_of(whole / "run" / "1-bridge")
    assert [stage["name"] for stage in metrics["stages"]] == ["bridge", "lora"]
    assert metrics["train"]["steps"] == 3 + 4
    assert metrics["eval"]["accuracy"] == last["eval"]["accuracy"] and "accuracy_before" not in last["eval"]
    assert metrics["eval"]["accuracy_before"] == first["eval"]["accuracy_before"]
    losses = metrics["eval"]["loss_by_kind"]["text_only"]
    assert losses["before"] == first["eval"]["loss_by_kind"]["text_only"]["before"]
    assert losses["after"] == last["eval"]["loss_by_kind"]["text_only"]["after"]
    rows = [json.loads(line) for line in (whole / "run" / "predictions.jsonl").read_text().splitlines()]
    assert all({"before", "after"} <= row.keys() for row in rows) and len(rows) == 3


def test_every_parameter_that_a_stage_trained_is_counted_once(whole):
    metrics = metrics_of(whole / "run")
    first, last = (stage["train"]["trainable_parameters"] for stage in metrics["stages"])
    tensors = read_tensors(whole / "run")
    assert metrics["train"]["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    new_tokens = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("token_rows"))
    assert metrics["train"]["trainable_parameters"] == first + last - new_tokens


def test_log_report_and_card_show_both_stages_on_one_axis(copied):
    run = RunFolder.read(copied / "run")
    assert [entry["step"] for entry in run.entries if "loss" in entry] == [*range(1, 8)]
    assert run.stage_starts == {"bridge": 0, "lora": 3} and run.steps == 7
    text = [entry["step"] for entry in run.entries if "eval_loss_text_only" in entry]
    assert text == [0, 3, 7]
    page, card = write_report(copied / "run").read_text(), (copied / "run" / "README.md").read_text()
    for shown in ("1. bridge", "2. lora", "text-only loss"):
        assert shown in page and shown in card
    assert 'href="1-bridge/report.html"' in page


def test_a_stage_folder_is_an_ordinary_run(copied):
    assert cli.main(["train", "run/2-lora/resolved_recipe.yaml", "--resume"]) == 0
    assert metrics_of(copied / "run" / "2-lora")["train"]["steps"] == 4


# --- resuming ---


def test_resuming_a_finished_run_changes_nothing(whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    train(load_recipe("./recipe.yaml"), resume=True)
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("deleted", [["1-bridge"], ["2-lora"], ["1-bridge", "2-lora"]], ids=" ".join)
def test_resuming_a_finished_run_whose_stages_are_deleted_changes_nothing(whole, copied, deleted):
    for name in deleted:
        shutil.rmtree(copied / "run" / name)
    before = contents(copied / "run")
    metrics = train(load_recipe(whole / "recipe.yaml"), resume=True)
    assert metrics == metrics_of(whole / "run") and contents(copied / "run") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LATER = "holds no finished stage, although a later stage was made from it; restore that folder"
FINISHED = "holds no finished stage, although the finished run was made from it; restore that folder"


@pytest.mark.parametrize(
    ("deleted", "override", "message"),
    [
        (["metrics.json", "1-bridge"], "train.save_steps=3", rf"stages.0 \(bridge\): run/1-bridge {LATER}"),
        (["1-bridge"], "stages.1.train.max_steps=9", rf"stages.0 \(bridge\): run/1-bridge {FINISHED}"),
        (["2-lora"], "stages.1.train.max_steps=9", rf"stages.1 \(lora\): run/2-lora {FINISHED}"),
        (
            ["1-bridge"],
            "stages.0.train.max_steps=9",
            r"stages.0 \(bridge\): train.max_steps was 3, is 9, but",
        ),
        (
            ["2-lora"],
            "stages.1.train.max_steps=2",
            r"stages.1 \(lora\): train.max_steps: got 2 .*run has tra",
        ),
        (
            ["2-lora"],
            "train.seed=5",
            r"stages.0 \(bridge\): run/1-bridge: a run of another recipe: train.seed",
        ),
        (
            ["2-lora"],
            "stages.1.train.batch_size=1",
            r"stages.1 \(lora\): run: a run of another recipe: train.batch",
        ),
        (
            ["metrics.json", "2-lora/metrics.json"],
            "stages.1.train.batch_size=1",
            r"stages.1 \(lora\): run/2-lora: a run of another recipe: train.batch_size was 2, is 1",
        ),
        (
            ["2-lora/checkpoints"],
            "stages.1.train.max_steps=9",
            r"stages.1 \(lora\): run/2-lora/checkpoints: no checkpoint of the finished run",
        ),
        (
            [],
            "stages.1.name=other",
            "run: a finished run of the stages bridge, lora, got bridge, other; only",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused_and_leaves_everything_as_it_was(
    whole, copied, deleted, override, message
):
    for name in deleted:
        path = copied / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(copied / "run")
    with pytest.raises(UserError, match=f"^{message}"):
        train(load_recipe(whole / "recipe.yaml", [override]), resume=True)
    assert contents(copied / "run") == before


def test_a_run_is_kept_until_what_extends_it_trains(whole, copied):
    """The rows of the last stage have changed, which its own check finds."""
    overrides = ["stages.1.train.max_steps=9", "stages.1.train.save_steps=3"]
    checkpoint = copied / "run" / "2-lora" / "checkpoints" / "step-4" / "checkpoint.json"
    before = {name: (copied / "run" / name).read_bytes() for name in ("metrics.json", "resolved_recipe.yaml")}
    record = json.loads(checkpoint.read_text())
    record["sources"] = {name: 7 for name in record["sources"]}
    write_manifest_of(checkpoint.parent, record)
    with pytest.raises(UserError, match=r"^stages.1 \(lora\): .*had 7 rows when this checkpoint was written"):
        train(load_recipe(whole / "recipe.yaml", overrides), resume=True)
    assert before == {name: (copied / "run" / name).read_bytes() for name in before}


def write_manifest_of(folder: Path, record: dict) -> None:
    (folder / MANIFEST).unlink()
    write_manifest(folder, {key: record[key] for key in ("step", "processes", "seconds", "ended", "sources")})


def test_stages_do_not_replace_a_run_without_them(copied):
    shutil.move(copied / "run" / "1-bridge", "plain")
    with pytest.raises(
        UserError, match="^plain: holds a run without stages; choose another train.output_dir"
    ):
        train(load_recipe("./recipe.yaml", ["train.output_dir=plain"]), resume=True)


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoints_alone(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("./recipe.yaml", ["train.checkpoint_dir=kept"])
    train(recipe)
    expected = Path("run", WEIGHTS).read_bytes()
    shutil.rmtree("run")
    shutil.rmtree("kept/2-lora/step-4")
    train(recipe, resume=True)
    assert Path("run", WEIGHTS).read_bytes() == expected


@pytest.mark.slow
def test_the_last_stage_can_be_extended_and_another_one_added(whole, copied):
    """The data are where they were; the run has been moved."""
    first = (copied / "run" / "1-bridge" / WEIGHTS).stat().st_mtime_ns
    metrics = train(load_recipe(whole / "recipe.yaml", ["stages.1.train.max_steps=5"]), resume=True)
    assert metrics["train"]["steps"] == 3 + 5
    recipe = yaml.safe_load((whole / "recipe.yaml").read_text())
    recipe["stages"][1]["train"]["max_steps"] = 5
    recipe["stages"].append(recipe["stages"][1] | {"name": "more", "train": {"max_steps": 1}})
    (whole / "three.yaml").write_text(yaml.safe_dump(recipe))
    metrics = train(load_recipe(whole / "three.yaml"), resume=True)
    assert [stage["name"] for stage in metrics["stages"]] == ["bridge", "lora", "more"]
    assert same_model(copied / "run", copied / "run" / "3-more")
    assert (copied / "run" / "1-bridge" / WEIGHTS).stat().st_mtime_ns == first


def test_a_stage_that_another_one_started_from_cannot_be_extended(whole, copied):
    with pytest.raises(
        UserError, match=r"^stages.0 \(bridge\): train.max_steps was 3, is 9, but the next stage"
    ):
        train(load_recipe(whole / "recipe.yaml", ["stages.0.train.max_steps=9"]), resume=True)


def test_a_changed_recipe_is_refused_with_its_stage(whole, copied):
    with pytest.raises(
        UserError, match=r"^stages.1 \(lora\): .*2-lora: a run of another recipe: train.batch_size"
    ):
        train(load_recipe(whole / "recipe.yaml", ["stages.1.train.batch_size=1"]), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "moment"), [("1-bridge", "metrics.json"), ("2-lora", "checkpoints/step-2")]
)
def test_a_run_killed_between_two_stages_or_in_the_second_resumes_bit_for_bit(
    whole, tmp_path, folder, moment
):
    write_recipe(tmp_path)
    command, log = ["train", "./recipe.yaml"], tmp_path / "log.txt"
    there = killing.file_there(tmp_path / "run" / folder, moment)
    code = killing.kill_when(killing.start(command, tmp_path, log), there)
    assert code == killing.KILLED, log.read_text()
    assert not (tmp_path / "run" / WEIGHTS).exists()
    first = (tmp_path / "run" / "1-bridge" / WEIGHTS).stat().st_mtime_ns
    assert killing.wait(killing.start([*command, "--resume"], tmp_path, log)) == 0, log.read_text()
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole / "run" / WEIGHTS).read_bytes()
    assert (tmp_path / "run" / "1-bridge" / WEIGHTS).stat().st_mtime_ns == first, "trained again"
    assert metrics_of(tmp_path / "run")["eval"] == metrics_of(whole / "run")["eval"]


GRPO = "{method: grpo, max_steps: 1, grpo: {num_generations: 2, reward: ['mine.py:fn']}}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.train.method=dpo", "preference pairs"),
        (f"stages.1.train={GRPO}", "mine.py:fn: .*division by zero"),
        ("stages.1.eval.metrics=['mine.py:fn']", "mine.py:fn: .*division by zero"),
        ("stages.1.train.report_to=[trackio]", "train.report_to: trackio is not installed"),
        ("stages.1.data.eval=[{path: broken.jsonl}]", "broken.jsonl: row 0: .*broken.png"),
    ],
)
def test_mistakes_in_a_later_stage_are_found_before_the_first_trains(copied, monkeypatch, override, message):
    Path("mine.py").write_text("def fn(prediction, references):\n    return 1 / 0\n")
    Path("broken.png").write_text("no image")
    row = {"question": "Which shade?", "answer": "Dark.", "image": "broken.png"}
    Path("broken.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(
        "flamingo_ft.training.monitoring.find_spec",
        lambda name: None if name == "trackio" else find_spec(name),
    )
    with pytest.raises(UserError, match=rf"^stages.1 \(lora\): .*{message}"):
        train(load_recipe("./recipe.yaml", ["train.output_dir=new", "lora.lora_dropout=0", override]))
    assert not Path("new").exists()


# --- plan and check ---


@pytest.mark.slow
def test_the_plan_of_the_whole_is_that_of_its_largest_stage(copied):
    recipe = load_recipe("./recipe.yaml")
    record = make_stage_plans(recipe).record()
    peaks = {stage["name"]: stage["cuda_peak"] for stage in record["stages"]}
    assert record["cuda"]["peak"] == max(peaks.values()) == peaks[record["largest"]]
    assert peaks == {
        stage.name: plan_memory(run).peak for stage, run in zip(recipe.stages, recipe.runs, strict=True)
    }


def test_check_reads_each_source_of_all_stages_once(copied):
    [(folder, report)] = check_recipe(load_recipe("./recipe.yaml"), "recipe", copied / "check")
    names = [(part.split, Path(part.name).name) for part in report.parts]
    assert names == [
        ("train", "train.jsonl"),
        ("train", "text.jsonl"),
        ("held out", "train.jsonl"),
        ("held out", "text.jsonl"),
    ]
    assert (
        report.training.startswith("stage bridge, training: 3 optimizer steps")
        and "stage lora" in report.training
    )


def test_stages_that_read_rows_differently_have_reports_of_their_own(copied):
    recipe = load_recipe("./recipe.yaml", ["stages.0.data.max_text_tokens=30"])
    reports = check_recipe(recipe, "recipe", copied / "check")
    assert [folder.name for folder, _ in reports] == ["1-bridge", "2-lora"]
    assert [report.too_long.limit for _, report in reports][0] == 30


# --- trying a run ---


def test_a_smoke_run_runs_every_stage_briefly_and_leaves_nothing(copied, capfd):
    before = sorted(copied.iterdir())
    assert cli.main(["train", "./recipe.yaml", "--smoke", "train.output_dir=new"]) == 0
    assert sorted(copied.iterdir()) == before
    output = capfd.readouterr()
    assert "stage 2 of 2, lora" in output.err and "for 4 steps" in output.out
