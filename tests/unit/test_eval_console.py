"""Progress and table of an evaluation."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dapo_megatron.eval.console import EvaluationProgress, print_summary
from dapo_megatron.eval.records import ProblemRecord, ResponseRecord
from dapo_megatron.eval.summary import summarize

RESPONSES = (
    ResponseRecord("Answer: 3", True, 1.0, "3", 5, "stop", None),
    ResponseRecord("Answer: 4", False, -1.0, "4", 7, "length", None),
)
RECORD = ProblemRecord(0, 0, 2, "?", "3", 1, RESPONSES)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=False)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_time_left_counts_from_generation_and_this_process_only(console):
    now = [0.0]
    with EvaluationProgress(10, 2, {0: 2, 1: 2}, console, lambda: now[0]) as progress:
        now[0] = 100.0
        progress.generating()
        for problem in (2, 3):
            now[0] += 30.0
            progress.add(replace(RECORD, problem=problem))
        assert progress.seconds_left() == pytest.approx(6 * 30.0)
    lines = printed(console).splitlines()
    assert lines == ["3/10 problems, accuracy so far 0.833, 0:03:30 left", "4/10 problems, accuracy so far 0.750, 0:03:00 left"]


def test_lines_without_a_terminal_are_few_and_the_last_problem_has_one(console):
    now = [0.0]
    with EvaluationProgress(50, 2, {}, console, lambda: now[0]) as progress:
        for problem in range(50):
            now[0] += 1.0
            progress.add(replace(RECORD, problem=problem))
    lines = printed(console).splitlines()
    assert len(lines) == 5 and lines[-1].startswith("50/50 problems")


def test_the_table_shows_every_number_with_its_error_and_the_files(console):
    records = [RECORD, replace(RECORD, problem=1, num_correct=0, responses=(RESPONSES[1],) * 2)]
    print_summary(summarize(records), "run on data", {"summary": Path("out/summary.json")}, console)
    text = printed(console)
    for row in ("avg@2", "pass@1", "pass@2", "maj@2", "6.5 tokens", "75.00 %", "0.2500", "out/summary.json"):
        assert row in text, row


def test_the_table_says_why_there_is_no_majority(console):
    silent = tuple(replace(response, stated_answer=None) for response in RESPONSES)
    print_summary(summarize([replace(RECORD, responses=silent)]), "run on data", {}, console)
    assert "no answers to count" in printed(console) and "no answer stated" not in printed(console)
