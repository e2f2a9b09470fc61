"""The demonstration's judgement, on logs whose answer is known: it must not be able to pass by mistake."""

from __future__ import annotations

from pathlib import Path

from deploy.lab.client import Commit, read_log
from deploy.lab.timeline import acknowledged_by_successor, compare, seen

SOURCE = [Commit(number, number - 0.5, float(number), "one") for number in range(1, 6)]
STANDBY = [Commit(number, number + 9.5, number + 10.0, "two") for number in range(7, 10)]
ALL = [1, 2, 3, 4, 5, 7, 8, 9]


def test_the_downtime_is_between_the_last_and_the_first() -> None:
    found = seen(SOURCE + STANDBY)
    assert found is not None
    assert (found.last_before.number, found.first_after.number) == (5, 7)
    assert found.downtime_s == 12.0
    assert seen(SOURCE) is None
    assert acknowledged_by_successor(SOURCE) == 0
    assert acknowledged_by_successor(SOURCE + STANDBY) == 3


def test_nothing_lost() -> None:
    rows = compare(SOURCE + STANDBY, ALL, until_s=5.0)
    assert (rows.acked, rows.missing, rows.doubled, rows.stray, rows.loss_s) == (8, (), (), (), 0.0)


def test_an_attempt_whose_answer_was_lost_may_be_there() -> None:
    assert compare(SOURCE + STANDBY, [*ALL, 6, 10], until_s=5.0).stray == ()


def test_a_missing_row_is_a_loss_back_to_the_last_kept_one() -> None:
    rows = compare(SOURCE + STANDBY, [1, 2, 3, 7, 8, 9], until_s=5.5)
    assert rows.missing == (4, 5)
    assert rows.loss_s == 2.5


def test_everything_lost_counts_from_the_first_commit() -> None:
    assert compare(SOURCE, [], until_s=5.5).loss_s == 5.0


def test_rows_twice_or_from_nowhere_are_found() -> None:
    rows = compare(SOURCE, [1, 2, 3, 4, 5, 5, 99], until_s=5.0)
    assert rows.doubled == (5,)
    assert rows.stray == (99,)


def test_the_log_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read_log(log) == []
    log.write_text("".join(f"{commit}\n" for commit in SOURCE) + "6 5.5 6.")
    assert read_log(log) == SOURCE
