"""The fencing argument, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from standby.takeover.errors import FenceIncomplete, SourceAlive
from standby.takeover.fence import SourceEvidence, check_held, check_source_fenced, check_source_gone, silence_left_s
from standby.takeover.record import Options

WORD, FORCE = Options(source_is_down=True), Options(force=True)
NOBODY: dict[str, str] = {}
SOMEBODY = {"10.0.0.5": "02:00:00:00:00:01"}


@pytest.mark.parametrize(
    ("silent_s", "destroyed", "answering", "options", "gone"),
    [
        (12.0, False, NOBODY, Options(), True),
        (9.0, False, NOBODY, Options(), False),
        (0.2, False, NOBODY, WORD, True),
        (0.2, True, NOBODY, Options(), True),
        (12.0, False, SOMEBODY, Options(), False),
        (12.0, False, SOMEBODY, WORD, False),
        (12.0, True, SOMEBODY, WORD, False),
        (12.0, False, None, Options(), False),
        (0.2, False, SOMEBODY, FORCE, True),
    ],
)
def test_unplanned(
    silent_s: float, destroyed: bool, answering: dict[str, str] | None, options: Options, gone: bool
) -> None:
    evidence = SourceEvidence(silent_s, destroyed, answering)
    if gone:
        check_source_gone(evidence, 10.0, options)
        return
    with pytest.raises(SourceAlive) as caught:
        check_source_gone(evidence, 10.0, options)
    assert caught.value.remedy


def test_silence_is_waited_for_only_where_it_counts() -> None:
    assert silence_left_s(SourceEvidence(4.0, False, None), 10.0, Options()) == 6.0
    assert silence_left_s(SourceEvidence(4.0, False, None), 10.0, WORD) == 0.0
    assert silence_left_s(SourceEvidence(4.0, True, None), 10.0, Options()) == 0.0


@pytest.mark.parametrize("evidence", [{}, {"remaining": None}, {"remaining": ["10.0.0.5/24"]}, {"remaining": "none"}])
def test_planned_needs_evidence_that_nothing_remains(evidence: dict[str, Any]) -> None:
    with pytest.raises(FenceIncomplete):
        check_source_fenced(evidence, ["10.0.0.5/24"])
    check_source_fenced({"removed": [], "remaining": []}, ["10.0.0.5/24"])


def test_the_standby_must_hold_every_address_with_any_prefix() -> None:
    check_held(["10.0.0.5/32", "fd00:0::5/64"], ["10.0.0.5/24", "fd00::5/64"])
    with pytest.raises(FenceIncomplete, match="fd00::5"):
        check_held(["10.0.0.5/24"], ["10.0.0.5/24", "fd00::5/64"])
