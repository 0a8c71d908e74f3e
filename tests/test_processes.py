"""Collective operations of the processes of a run; in a single process they return at once."""

import pytest

from flamingo_ft import processes
from flamingo_ft.errors import ReportedElsewhere, UserError


def test_unshard_returns_results_in_the_order_of_the_items(monkeypatch):
    items, shards = list(range(7)), []
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shards.append(processes.shard(items))
    monkeypatch.setattr(processes, "all_gather", lambda shard: shards)
    assert processes.unshard(shards[0]) == items


def test_in_a_single_process_collectives_return_its_own_values():
    assert processes.all_gather("a") == ["a"] and processes.unshard([1, 2]) == [1, 2]
    assert processes.any_process(True) and not processes.any_process(False)
    assert processes.run_on_main(lambda: 3) == 3
    with pytest.raises(UserError, match="no such file"), processes.raise_together():
        raise UserError("no such file")


@pytest.mark.parametrize("is_main", [True, False])
def test_an_error_of_another_process_ends_this_one_and_only_the_main_one_reports_it(monkeypatch, is_main):
    monkeypatch.setattr(processes, "is_main", lambda: is_main)
    monkeypatch.setattr(processes, "any_process", lambda flag: True)
    monkeypatch.setattr(processes, "all_gather", lambda message: [message, "row 3: no image"])
    expected = (UserError, "process 1: row 3: no image") if is_main else (ReportedElsewhere, None)
    with pytest.raises(expected[0], match=expected[1]) as caught, processes.raise_together():
        pass
    assert isinstance(caught.value, ReportedElsewhere) is not is_main
