"""The tables of a run beside its scores: held-out losses by kind of row, held-out pairs, and its stages."""

from dataclasses import asdict

from flamingo_ft.evaluation.loss_by_kind import LossByKind, loss_record
from flamingo_ft.evaluation.pair_rewards import PairRewards
from flamingo_ft.evaluation.run_tables import run_tables

ROWS = [(True, 6.0, 2), (False, 1.0, 4), (True, 4.0, 3), (False, 3.0, 4)]  # has images, summed loss, tokens


def test_the_loss_of_a_kind_is_the_mean_over_the_label_tokens_of_its_rows():
    measured = LossByKind.of_rows(ROWS)
    assert {kind: (loss.value, loss.samples) for kind, loss in measured.losses.items()} == {
        "text_only": (0.5, 2),
        "with_images": (2.0, 2),
    }
    assert LossByKind.of_log(measured.log_values()) == measured


def test_rows_of_text_alone_have_one_kind_and_rows_with_images_none():
    assert [*LossByKind.of_rows([row for row in ROWS if not row[0]]).losses] == ["text_only"]
    assert LossByKind.of_rows([row for row in ROWS if row[0]]) is None


def test_the_share_of_ranked_pairs_counts_those_whose_chosen_answer_has_more_reward():
    measured = PairRewards.of_margins([0.5, 0.0, -0.25, 0.75])
    assert measured == PairRewards(samples=4, ranked_correctly=0.5, reward_margin=0.25)
    (table,) = run_tables({"eval": {"accuracy": 0.5, "pairs": asdict(measured)}})
    assert table.rows == [["4", "50.0 %", "+0.25"]]


def test_a_stage_table_has_the_scores_before_the_first_stage_and_after_each():
    losses = {"before": LossByKind.of_rows(ROWS), "after": LossByKind.of_rows(ROWS[:3])}
    evaluation = {"accuracy": 0.5, "accuracy_before": 0.25, "loss_by_kind": loss_record(losses)}
    stage = {
        "name": "bridge",
        "trained": ["bridge"],
        "train": {"steps": 9, "seconds": 61},
        "eval": evaluation,
    }
    tables = run_tables({"eval": evaluation, "stages": [stage]})
    assert [[*table.rows] for table in tables] == [
        [["text only", "2", "0.5000", "0.2500"], ["with images", "2", "2.0000", "2.0000"]],
        [
            ["before", "", "", "", "25.0 %", "0.5000", "2.0000"],
            ["1. bridge", "bridge", "9", "1 min 1 s", "50.0 %", "0.2500", "2.0000"],
        ],
    ]


def test_a_run_of_images_alone_has_no_such_table():
    assert run_tables({"eval": {"accuracy": 1.0}, "train": {}}) == []
