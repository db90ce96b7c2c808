"""`dapo-megatron evaluate` up to the point where processes are started."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dapo_megatron import cli
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.eval.records import ProblemRecord, ResponseRecord
from dapo_megatron.examples import max_of_two
from dapo_megatron.launcher.policy_source import PolicySource, find_policy
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.types import ConfigError, DataError

SHAPE = ("--data.chat_template=false", "--data.max_prompt_tokens=8", "--eval.max_response_tokens=2")
"""What fits the quick start's model."""
AIME = Path(__file__).parents[2] / "configs" / "aime2024.yaml"
REAL_AIME = Path(__file__).parents[3] / "shared" / "data" / "aime2024.jsonl"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PolicySource:
    """The quick start's model, 64 positions, with its held-out problems beside it."""
    folder = tmp_path_factory.mktemp("assets")
    config = Config.model_validate({"model": {"path": folder / "model"}, "data": {"path": str(folder / "pairs.jsonl")}})
    max_of_two.prepare(config)
    return find_policy(folder / "model")


def problems_of(source: PolicySource, *overrides: str, files: tuple[Path, ...] = ()):
    from dapo_megatron.evaluate import check, evaluation_config

    return check(source, evaluation_config(source, files, [*SHAPE, *overrides]))


def held_out(source: PolicySource) -> str:
    return f"--eval.path={source.path.with_name('pairs.heldout.jsonl')}"


def test_sound_input_gives_the_problems(source):
    assert len(problems_of(source, held_out(source)).prompts) == 20


def answer_all(measurement, *, but_last: int = 0) -> None:
    """In place of the processes: the missing problems, each answered right once and wrong once."""
    right, wrong = (ResponseRecord(text, text == "r", 0.0, text, 1, "stop", None) for text in "rw")
    for number, prompt in list(measurement.missing.items())[: len(measurement.missing) - but_last]:
        record = ProblemRecord(number, prompt.index, 0, prompt.text, prompt.answer, 1, (right, wrong))
        measurement.folder.add(record)


def test_an_evaluation_goes_on_with_what_is_missing_and_ends_when_nothing_is(source, tmp_path, monkeypatch, capsys):
    from dapo_megatron import evaluate

    asked: list[list[int]] = []

    def measure(but_last: int):
        def run(measurement) -> None:
            asked.append(list(measurement.missing))
            answer_all(measurement, but_last=but_last)

        return run

    line = [*SHAPE, held_out(source), "--eval.num_samples=2"]
    monkeypatch.setattr(evaluate._Measurement, "run", measure(but_last=3))
    evaluate.run(source.path, [], line, tmp_path)
    monkeypatch.setattr(evaluate._Measurement, "run", measure(but_last=0))
    assert evaluate.run(source.path, [], line, tmp_path) == 0
    assert asked == [list(range(20)), [17, 18, 19]]
    assert "17 problems are done" in capsys.readouterr().out
    assert evaluate.run(source.path, [], line, tmp_path) == 0
    assert len(asked) == 2 and "avg@2" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["avg_at_2"]["value"] == 0.5
    with pytest.raises(ConfigError, match=r"eval\.top_p is 0\.5, but the evaluation in .* has 0\.7"):
        evaluate.run(source.path, [], [*line, "--eval.top_p=0.5"], tmp_path)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ((), "--data is missing"),
        (("--eval.path=nowhere.jsonl",), r"--data \(nowhere.jsonl\) must be an existing file"),
        (
            ("HELD_OUT", "--eval.num_samples=4", "--eval.temperature=0"),
            r"eval.num_samples \(4\) must be 1 with eval.temperature 0",
        ),
        (
            ("HELD_OUT", "--eval.max_response_tokens=80"),
            r"data.max_prompt_tokens \+ eval.max_response_tokens .*shorten one of them by 24",
        ),
        (("HELD_OUT", "--eval.max_response_tokens=null"), r"data.max_prompt_tokens \+ rollout.max_response_tokens"),
        (("HELD_OUT", "--eval.num_sample=4"), "did you mean --eval.num_samples"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(source, overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        problems_of(source, *(held_out(source) if override == "HELD_OUT" else override for override in overrides))


def test_an_evaluation_leaves_no_problem_out_for_its_length(source, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in ("1,0>", "1,0>1,0>1,0>")))
    with pytest.raises(DataError, match=r"1 of 2 problems .* more prompt tokens than data.max_prompt_tokens \(8\)"):
        problems_of(source, f"--eval.path={data}")


def test_an_hf_directory_stays_the_model_whatever_the_files_say(source, tmp_path):
    from dapo_megatron.evaluate import evaluation_config

    file = tmp_path / "run.yaml"
    file.write_text("model: {path: elsewhere}\neval: {num_samples: 3}\n")
    config = evaluation_config(source, [file], [])
    assert (config.model.path, config.eval.num_samples) == (source.path, 3)


def test_a_run_gives_the_settings_that_are_not_given_here(tmp_path):
    from dapo_megatron.evaluate import evaluation_config

    run = RunFolder(tmp_path)
    source = PolicySource(tmp_path / "checkpoints" / "step_000002", run, 2)
    sections = {"model": {"path": "m"}, "data": {"path": "d"}, "eval": {"num_samples": 5, "top_p": 0.9}}
    run.create({"config": sections})
    config = evaluation_config(source, [AIME], ["--eval.top_p=0.8"])
    assert (config.model.path, config.eval.num_samples, config.eval.top_p) == (Path("m"), 32, 0.8)
    run.create({"config": {**sections, "eval": {"every": 5}}})
    with pytest.raises(ConfigError, match=r"config\.json: eval\.every is not a configuration key"):
        evaluation_config(source, [], [])


def test_settings_name_what_the_results_depend_on(source):
    from dapo_megatron.eval.measure import Protocol
    from dapo_megatron.evaluate import evaluation_config, settings_of

    problems = problems_of(source, held_out(source))

    def settings(*overrides: str) -> dict:
        config = evaluation_config(source, [], ["--eval.max_response_tokens=2", *overrides])
        return settings_of(source, config, problems, Protocol.of(config, (13,)))

    before = settings()
    for path, value in (
        ("eval.top_p", "0.9"),
        ("eval.sampling_seed", "2"),
        ("reward.type", "exact"),
        ("rollout.engine.dtype", "bf16"),
    ):
        after = settings(f"--{path}={value}")
        assert {name for name in before if before[name] != after[name]} == {path}
    for free in ("reward.num_workers=7", "rollout.num_engines=2", "rollout.top_k=5", "actor.tensor_parallel_size=2"):
        assert settings(f"--{free}") == before


class Words:
    """A tokenizer of words whose chat template is the message itself."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize):
        return conversation[0]["content"]

    def __call__(self, texts, *, add_special_tokens):
        return {"input_ids": [list(range(len(text.split()))) for text in texts]}


@pytest.mark.skipif(not REAL_AIME.is_file(), reason=f"{REAL_AIME} is missing: AIME 2024 cannot be shipped")
def test_the_aime_protocol_reads_the_real_problems():
    """Over a run whose own columns are others."""
    config = load_config([AIME], ["--model.path=m", "--data.path=d", "--data.prompt_field=question", f"--eval.path={REAL_AIME}"])
    problems = load_prompts(config.eval_data, Words())
    assert len(problems.prompts) == problems.report.num_rows == 30
    assert problems.prompts[0].answer == "204" and all(0 <= int(prompt.answer) < 1000 for prompt in problems.prompts)
    assert all(prompt.text.endswith('on its own line after "Answer:".') for prompt in problems.prompts)


@pytest.mark.parametrize(("written", "truth"), [("034", "34"), ("0", "0"), ("000", "0"), (73, "73"), (r"336^\circ", "336")])
def test_answers_of_the_aime_protocol_are_integers(tmp_path, written, truth):
    file = tmp_path / "aime.jsonl"
    file.write_text(json.dumps({"problem": "?", "answer": written}))
    config = load_config([AIME], ["--model.path=m", "--data.path=d", f"--eval.path={file}"])
    assert [prompt.answer for prompt in load_prompts(config.eval_data, Words()).prompts] == [truth]


def test_the_aime_protocol_is_that_of_the_paper():
    config = load_config([AIME], ["--model.path=m", "--data.path=d"])
    settings = config.eval
    assert (settings.num_samples, settings.temperature, settings.top_p, config.max_eval_response_tokens) == (32, 1.0, 0.7, 20480)
    assert config.reward.type == "dapo" and config.eval_data is None


def test_options_are_short_for_paths_and_win(monkeypatch):
    calls: list[tuple] = []
    module = ModuleType("dapo_megatron.evaluate")
    module.run = lambda *arguments: calls.append(arguments) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dapo_megatron.evaluate", module)
    line = "evaluate --samples 8 runs/hot a.yaml --top-p 0.5 --seed 7 --data 1e3.jsonl --temperature 0.5 --out results"
    monkeypatch.setattr(sys, "argv", ["dapo-megatron", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    ((source, files, overrides, out),) = calls
    assert (source, files, out) == (Path("runs/hot"), [Path("a.yaml")], Path("results"))
    config = load_config([], ["--model.path=m", "--data.path=d", *overrides])
    assert (config.eval.path, config.eval.num_samples, config.run.seed) == ("1e3.jsonl", 8, 7)
    assert (config.eval.temperature, config.eval.top_p) == (0.5, 0.5)


def test_evaluate_without_a_source_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dapo-megatron", "evaluate", "--samples", "8", "--rollout.num_engines", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "RUN|CHECKPOINT|HF_DIR" in capsys.readouterr().err
