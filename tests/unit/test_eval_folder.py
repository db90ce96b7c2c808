"""Records on disk: resume, refusals, and the summary made of them."""

import json
from pathlib import Path

import pytest

from dapo_megatron.eval.folder import EvaluationFolder
from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.eval.statistics import Estimate
from dapo_megatron.eval.summary import summarize
from dapo_megatron.types import CheckpointError, ConfigError, EngineError, Prompt, RolloutGroup, Sample, Score

SETTINGS = {"weights": "a1", "eval.num_samples": 2, "eval.temperature": 1.0, "stop_token_ids": (1, 2)}
ABOUT = {"source": "runs/x"}


def group(problem: int, correct: tuple[bool, ...], answers: tuple[str | None, ...], version: int = 4) -> RolloutGroup:
    samples = tuple(
        Sample(
            (7,) * (index + 1), (-0.5,) * (index + 1), (version,) * (index + 1), "stop" if index else "length", f"é\ud800 {index}"
        )
        for index in range(len(correct))
    )
    scores = tuple(Score(float(right), right, None, answer) for right, answer in zip(correct, answers, strict=True))
    return RolloutGroup(problem, Prompt(problem + 10, (5,), f"problem {problem}", "3"), samples, scores)


def record(
    problem: int, correct: tuple[bool, ...] = (True, False), answers: tuple[str | None, ...] = ("3", None)
) -> ProblemRecord:
    return ProblemRecord.of(group(problem, correct, answers), weight_version=4)


def open_folder(path: Path, **changes: object) -> EvaluationFolder:
    return EvaluationFolder(path, {**SETTINGS, **changes}, ABOUT)


def test_a_record_survives_its_line():
    assert ProblemRecord.from_json(record(3).to_json()) == record(3)
    assert "\n" not in record(3).to_json()


def test_tokens_of_other_weights_are_an_error():
    with pytest.raises(EngineError, match="problem 0 was answered by weights of version 3, not 4"):
        ProblemRecord.of(group(0, (True,), ("3",), version=3), weight_version=4)


def test_an_interrupted_evaluation_knows_what_is_done(tmp_path):
    with open_folder(tmp_path / "out") as folder:
        assert folder.num_correct == {}
        for problem in (2, 0):
            folder.add(record(problem))
    with open_folder(tmp_path / "out") as folder:
        assert folder.num_correct == {2: 1, 0: 1}
        folder.add(record(1))
        assert [read.problem for read in folder.records()] == [2, 0, 1]


def test_a_line_cut_off_by_a_crash_is_evaluated_again(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.add(record(0))
        folder.add(record(1))
    file = tmp_path / "problems.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    with open_folder(tmp_path) as folder:
        assert folder.num_correct == {0: 1}
        folder.add(record(1))
        assert list(folder.records()) == [record(0), record(1)]


@pytest.mark.parametrize("line", [b"{}\n", b"[]\n", b"not json\n", b'{"problem": 1, "unknown": 2}\n'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    with open_folder(tmp_path) as folder:
        folder.add(record(0))
    with (tmp_path / "problems.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(CheckpointError, match=r"problems\.jsonl, line 2"), open_folder(tmp_path):
        pass


def test_changed_settings_are_all_named(tmp_path):
    with open_folder(tmp_path):
        pass
    with pytest.raises(ConfigError) as refused, open_folder(tmp_path, weights="b2", **{"eval.temperature": 0.6}):
        pass
    first, second = refused.value.problems
    assert first.startswith(f'weights is "b2", but the evaluation in {tmp_path} has "a1"')
    assert second.startswith(f"eval.temperature is 0.6, but the evaluation in {tmp_path} has 1.0") and "--out" in second


def test_where_the_weights_lie_may_change(tmp_path):
    with open_folder(tmp_path):
        pass
    with EvaluationFolder(tmp_path, SETTINGS, {"source": "elsewhere"}) as folder:
        assert folder.num_correct == {}


def test_a_folder_in_use_is_refused(tmp_path):
    with open_folder(tmp_path), pytest.raises(ConfigError, match="another process evaluates into"), open_folder(tmp_path):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "problems.jsonl").write_text("theirs\n")
    with pytest.raises(ConfigError, match=r"problems\.jsonl but no settings\.json"), open_folder(tmp_path):
        pass
    assert (tmp_path / "problems.jsonl").read_text() == "theirs\n"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out .* must be a folder"), open_folder(tmp_path / "file"):
        pass


def test_the_summary_counts_responses_and_averages_problems(tmp_path):
    records = [
        record(0, (True, True, False, False), ("3", "3", "4", None)),
        record(1, (False, False, False, True), ("4", "4", "4", "3")),
    ]
    summary = summarize(records)
    assert (summary.num_problems, summary.num_samples) == (2, 4)
    assert summary.avg == Estimate(pytest.approx(0.375), pytest.approx(0.125))
    assert {k: estimate.value for k, estimate in summary.pass_at.items()} == pytest.approx({1: 0.375, 2: 2 / 3, 4: 1.0})
    assert summary.majority is not None and summary.majority.value == 0.5
    assert (summary.response_length_mean_tokens, summary.response_length_max_tokens) == (2.5, 4)
    assert (summary.truncated_fraction, summary.unanswered_fraction, summary.num_reward_errors) == (0.25, 0.125, 0)
    assert [name for name, _ in summary.rows()] == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@4"]
    with open_folder(tmp_path) as folder:
        written = json.loads(folder.write_summary(summary.to_dict()).read_text())
    assert written["avg_at_4"]["value"] == pytest.approx(0.375) and written["maj_at_4"]["value"] == 0.5
    assert written["settings"]["eval.num_samples"] == 2 and written["about"] == ABOUT


def test_responses_that_cannot_vote_have_no_majority():
    summary = summarize([record(0, (True, False), (None, None))])
    assert summary.majority is None and summary.unanswered_fraction is None
    assert [name for name, _ in summary.rows()] == ["avg@2", "pass@1", "pass@2"]
    assert summary.to_dict()["maj_at_2"] is None
