"""The report of a run shows its state, needs no other files, and never ends the run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from flamingo_ft.cli.metrics_table import evaluation_lines
from flamingo_ft.config import dump_recipe
from flamingo_ft.errors import StoppedBySignal, UserError
from flamingo_ft.evaluation.image_loss_gap import ImageLossGap
from flamingo_ft.report import curves, final_report, gates, write_report
from tests.regimes import recipe, write_run
from tests.thinned import slow

pytestmark = pytest.mark.usefixtures("whole_runs")

REFRESH = 'http-equiv="refresh"'


def entries(steps: int, layers: int = 2) -> list[dict]:
    """A log with values for every figure but those of DPO."""
    numbers = {"grad_norm": 1.0, "memory_gib": 1.5, "images_per_second": 9.0, "label_tokens_per_second": 99.0}
    gate_names = [(kind, layer) for kind in ("attention", "feed_forward") for layer in range(layers)]
    gate_values = {f"gate/{kind}/{layer}": -0.1 * layer for kind, layer in gate_names}
    numbers |= {"learning_rate": 1e-3} | gate_values
    return [
        {"loss": 1 / step, "seconds": 2.0 * step, "step": step, **numbers} for step in range(1, steps + 1)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a run in progress: step 4 of 8."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved_recipe.yaml").write_text(dump_recipe(recipe("train.max_steps=8")))
    write(tmp_path / "run", entries(4))
    return tmp_path / "run"


def write(folder, log: list[dict], predictions: list[dict] | None = None) -> None:
    for name, rows in (("log", log), ("predictions", predictions or [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(folder) -> None:
    task = {"accuracy": 0.75, "samples": 4, "before": 0.25, "shuffled_images": 0.5}
    evaluation = {"accuracy": 0.75, "accuracy_before": 0.25, "accuracy_shuffled_images": 0.5}
    evaluation["per_task"] = {"shade": task}
    trained = {"steps": 8, "seconds": 75.0, "trainable_parameters": 12_345}
    (folder / "metrics.json").write_text(json.dumps({"eval": evaluation, "train": trained}))


def words(page: str) -> str:
    """The page's text, without markup."""
    parser = HTMLParser()
    texts: list[str] = []
    parser.handle_data = texts.append
    parser.feed(page)
    return " ".join(" ".join(texts).split())


def test_the_page_of_a_run_in_progress_shows_its_step_and_reloads(folder):
    page = write_report(folder, in_progress=True).read_text()
    assert REFRESH in page
    assert "training, step 4 of 8, about 8 s left" in words(page)
    assert "resolved_recipe.yaml --resume" in page


def test_the_page_of_a_finished_run_shows_its_accuracies_and_does_not_reload(folder):
    finish(folder)
    page = write_report(folder).read_text()
    assert REFRESH not in page
    for shown in ("finished after 8 steps", "12,345", "1 min 15 s"):
        assert shown in words(page)
    assert "shade 4 25.0 % 75.0 % 50.0 %" in words(page) and "all 4" not in words(page)
    assert "flamingo-ft generate" in page and "--resume" not in page


def test_what_to_try_next_is_in_the_report_and_in_the_summary(folder):
    finish(folder)
    assert "--probe" not in write_report(folder).read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["eval"]["advice"] = ["the loss was still falling: train longer"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = words(write_report(folder).read_text())
    assert "What next The loss was still falling: train longer. " in page
    assert "flamingo-ft check run/resolved_recipe.yaml --probe" in page.replace(str(folder), "run")
    assert "next: the loss was still falling: train longer" in evaluation_lines(metrics["eval"])


@pytest.mark.parametrize(
    "error, shown",
    [
        (StoppedBySignal(15, 4), "stopped at step 4 of 8 by SIGTERM"),
        slow(UserError("loss is nan\nmore"), "by an error: loss is nan"),
    ],
)
def test_the_page_of_a_stopped_run_names_the_signal_or_error(folder, error, shown):
    with pytest.raises(type(error)), final_report(folder):
        raise error
    page = (folder / "report.html").read_text()
    assert shown in words(page) and REFRESH not in page


def test_the_page_needs_no_other_files_and_runs_no_scripts(folder):
    prediction = {
        "task": "t",
        "images": [],
        "question": "<script>alert(1)</script>",
        "answer": "a",
        "before": "b",
    }
    write(folder, entries(4), [prediction])
    page = write_report(folder).read_text()
    assert "<script" not in page and "default-src 'none'" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert len(sources) >= 7 and all(source.startswith("data:image/png") for source in sources)


def test_every_figure_on_the_page_is_a_file_too(folder):
    page = write_report(folder).read_text()
    assert page.count("<img") == len(list((folder / "figures").glob("*.png"))) >= 6


@pytest.mark.parametrize("log", [[], entries(1), entries(3, layers=0), [{"eval_loss": 1.0, "step": 2}]])
def test_a_run_with_little_in_its_log_has_a_report(folder, log):
    write(folder, log)
    assert "</html>" in write_report(folder, in_progress=True).read_text()


def test_a_nan_loss_is_left_out_of_the_curve():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]
    (axes,) = curves.loss_figure(log).axes
    assert list(axes.lines[0].get_ydata()) == [2.0, 1.0]


def test_early_losses_far_above_all_later_ones_are_named_and_cut_off():
    log = [{"step": step, "loss": 1 + 10 / step**3} for step in range(1, 101)]
    (axes,) = curves.loss_figure(log).axes
    assert axes.get_ylim() == (0, pytest.approx(1.3 * (1 + 10 / 11**3)))
    assert "up to 11 at step 1" in [text.get_text() for text in axes.texts]
    assert max(axes.lines[0].get_ydata()) == 11


@pytest.mark.parametrize("losses", [[3.0], [2.0, 1.2, 1.0], [0.5] * 20 + [9.0] + [0.5] * 20])
def test_losses_that_fall_slowly_or_rise_later_are_all_on_the_axis(losses):
    (axes,) = curves.loss_figure([{"step": n, "loss": loss} for n, loss in enumerate(losses, start=1)]).axes
    assert axes.get_ylim() == (0, pytest.approx(1.08 * max(losses)))


def test_a_long_curve_is_thinned_and_keeps_its_end():
    result = curves.curve([{"step": n, "loss": n} for n in range(1, 10_002)], "loss")
    assert len(result.steps) <= curves.MAX_POINTS and result.steps[-1] == 10_001


def test_parts_with_equal_learning_rates_share_a_curve():
    rates = {
        "learning_rate/perceiver": 1e-3,
        "learning_rate/cross_attention": 1e-3,
        "learning_rate/lora": 1e-4,
    }
    (axes,) = curves.learning_rate_figure([{"step": n, "learning_rate": 1e-3, **rates} for n in (1, 2)]).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 2
    assert labels[0].startswith("cross attention, perceiver") and labels[1].startswith("lora")


def gap_entry(step: int, value: float, error: float, samples: int = 50) -> dict:
    return {"step": step} | ImageLossGap(value, error, samples).log_values()


def test_the_image_loss_gap_is_drawn_with_three_standard_errors_beside_the_gates(folder):
    gaps = [gap_entry(0, 0.0, 0.0), gap_entry(2, float("nan"), 0.1), gap_entry(4, 0.5, 0.1)]
    (axes,) = curves.image_loss_gap_figure(gaps).axes
    assert list(axes.lines[0].get_xdata()) == [0, 4] and list(axes.lines[0].get_ydata()) == [0.0, 0.5]
    assert axes.collections[0].get_datalim(axes.transData).intervaly == pytest.approx([0, 0.8])

    write(folder, [*entries(4), *gaps])
    page = write_report(folder).read_text()
    assert "0 means that the answers are predicted without looking. At step 4: +0.5 ± 0.1, clearly" in words(
        page
    )
    assert "How far each gate is open" in words(page) and (folder / "figures/image_loss_gap.png").is_file()


def test_a_gap_near_zero_and_one_of_few_samples_are_described_as_such(folder):
    write(folder, [*entries(4), gap_entry(4, 0.1, 0.1)])
    assert "+0.1 ± 0.1, not distinguishable from zero" in words(write_report(folder).read_text())
    write(folder, [*entries(4), gap_entry(4, 0.5, 0.1, samples=3)])
    page = words(write_report(folder).read_text())
    assert "predicted without looking." in page and "At step 4" not in page


def test_a_run_without_a_gap_has_no_curve_of_it(folder):
    assert "predicted without looking" not in write_report(folder).read_text()


@pytest.mark.parametrize("layers", [2, 32])
def test_gates_are_drawn_per_layer_as_absolute_values(layers):
    attention, feed_forward, *_ = gates.gate_figure(entries(3, layers)).axes
    for axes in (attention, feed_forward):
        assert [line.get_ydata()[-1] for line in axes.lines] == pytest.approx(
            [0.1 * n for n in range(layers)]
        )


def test_rewards_of_dpo_are_shown(folder):
    write(folder, [entry | {"rewards/margins": 0.5, "rewards/accuracies": 0.9} for entry in entries(4)])
    page = words(write_report(folder).read_text())
    assert "training reward margin 0.5" in page and "training pairs ranked correctly 90.0 %" in page
    assert "held-out pairs" not in page
    assert (folder / "figures" / "reward_margin.png").is_file()


def test_a_report_that_fails_is_a_warning_and_does_not_end_the_run(folder, monkeypatch):
    monkeypatch.setattr("flamingo_ft.report.page.write_report", lambda *_, **__: 1 / 0)
    with (
        pytest.warns(UserWarning, match="report could not be written: ZeroDivisionError"),
        final_report(folder),
    ):
        pass


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not the folder of a run, resolved_recipe.yaml not found"):
        write_report(tmp_path)


def test_no_report_is_written_if_no_run_began(tmp_path):
    with final_report(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "caption"),
    [
        ("sft", "Cross-entropy of the reference answers"),
        slow("dpo", "The preference loss"),
        slow("kto", "The loss of good and bad"),
        ("grpo", "In training the policy loss"),
    ],
)
def test_the_loss_is_described_as_that_of_the_runs_method(folder, method, caption):
    (folder / "resolved_recipe.yaml").write_text(
        dump_recipe(recipe("train.max_steps=8", "train.batch_size=8", f"train.method={method}"))
    )
    assert caption in words(write_report(folder).read_text())
