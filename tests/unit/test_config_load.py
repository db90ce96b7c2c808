"""Files, overrides and the sentences of ConfigError."""

from pathlib import Path

import pytest

from dapo_megatron.config.fields import config_fields
from dapo_megatron.config.load import load_config, nearest, resolved_dict
from dapo_megatron.config.schema import Config
from dapo_megatron.types import ConfigError

REQUIRED = ["--model.path", "models/tiny", "--data.path", "train.jsonl"]


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def problems_of(files: list[Path], overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    return caught.value.problems


def test_later_files_win_leaf_by_leaf_and_overrides_come_last(tmp_path):
    first = write(tmp_path, "train: {num_rollout_steps: 5, num_prompts_per_step: 4}\nrun: {seed: 1}\n", "first.yaml")
    second = write(tmp_path, "train: {num_rollout_steps: 6}\nrun: {seed: 2}\n", "second.yaml")
    config = load_config([first, second], [*REQUIRED, "--run.seed", "3"])
    assert (config.train.num_rollout_steps, config.train.num_prompts_per_step, config.run.seed) == (6, 4, 3)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--actor.optimizer.lr", "1e-6"], 1e-6),
        (["--actor.optimizer.lr=2.5E-4"], 2.5e-4),
        (["--actor.optimizer", "{lr: 3e-05}"], 3e-5),
        (["--optimizer.lr", ".5"], 0.5),
        (["--lr", "1"], 1.0),
    ],
)
def test_override_forms(tokens, expected):
    assert load_config([], [*REQUIRED, *tokens]).actor.optimizer.lr == expected


def test_scientific_notation_in_a_file_is_a_number(tmp_path):
    file = write(tmp_path, "actor: {optimizer: {lr: 1e-6, eps: 1.0e-8}}\n")
    config = load_config([file], REQUIRED)
    assert (config.actor.optimizer.lr, config.actor.optimizer.eps) == (1e-6, 1e-8)


def test_override_value_may_be_negative_null_or_contain_an_equals_sign():
    tokens = ["--reward.wrong_reward", "-1.5", "--checkpoint.load", "null", "--data.prompt_template=a={problem}"]
    config = load_config([], [*REQUIRED, "--checkpoint.load", "elsewhere", *tokens])
    assert config.reward.wrong_reward == -1.5
    assert config.checkpoint.load is None
    assert config.data.prompt_template == "a={problem}"


def test_unique_leaf_name_is_accepted_and_an_ambiguous_one_lists_the_candidates():
    assert load_config([], [*REQUIRED, "--seed", "7"]).run.seed == 7
    (problem,) = problems_of([], [*REQUIRED, "--path", "x"])
    assert problem.startswith("--path is ambiguous; write --model.path") and "--data.path" in problem


def test_keys_of_a_pass_through_table_are_free():
    config = load_config([], [*REQUIRED, "--actor.megatron_extra.cross_entropy_loss_fusion", "true"])
    assert config.actor.megatron_extra == {"cross_entropy_loss_fusion": True}


def test_empty_section_in_a_file_keeps_the_defaults(tmp_path):
    file = write(tmp_path, "actor:\n  # tensor_parallel_size: 2\n")
    assert load_config([file], REQUIRED).actor == Config.model_fields["actor"].default


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("actor.tensor_paralel_size", "actor.tensor_parallel_size"),
        ("actor.lr", "actor.optimizer.lr"),
        ("train.seed", "run.seed"),
        ("trian", "train"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest_names(tmp_path, key, suggestion):
    *sections, leaf = key.split(".")
    text = "".join("  " * depth + f"{name}:\n" for depth, name in enumerate(sections)) + "  " * len(sections) + f"{leaf}: 1\n"
    (problem,) = problems_of([write(tmp_path, text)], REQUIRED)
    assert problem.startswith(f"{key} is not a configuration key; did you mean {suggestion}")


def test_key_of_another_engine_type_is_named_as_such():
    (problem,) = problems_of([], [*REQUIRED, "--rollout.engine.type=sglang", "--rollout.engine.max_batch_size=8"])
    assert problem == (
        "rollout.engine.max_batch_size belongs to another rollout.engine.type than the one chosen; remove it, or change the type."
    )


def test_all_problems_are_reported_at_once():
    problems = problems_of(
        [],
        [
            "--model.path=m",
            "--train.num_samples_per_prompt=1",
            "--model.dtype=fp61",
            "--actor.tensor_size=2",
            "--algo.clip_ratio_low=1",
            "--run.seed",
        ],
    )
    text = "\n".join(problems)
    assert len(problems) == 6
    assert "train.num_samples_per_prompt (1) must be at least 2. Meaning: G, samples per prompt." in text
    assert 'model.dtype ("fp61") must be fp32 or bf16.' in text
    assert "algo.clip_ratio_low (1) must be less than 1." in text
    assert "data is missing; set it in a file or with --data.path VALUE." in text
    assert "--actor.tensor_size is not a configuration key; did you mean --actor.tensor_parallel_size" in text
    assert "--run.seed needs a value" in text


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("--run.seed=true", "run.seed (true) must be an integer."),
        ('--run.seed="7"', 'run.seed ("7") must be an integer.'),
        ("--run.seed=7.5", "run.seed (7.5) must be an integer."),
        ("--algo.clip_ratio_high=wide", 'algo.clip_ratio_high ("wide") must be a number.'),
        ("--algo.dynamic_sampling=1", "algo.dynamic_sampling (1) must be true or false."),
        ("--data.path=5", "data.path (5) must be text"),
        ("--actor.optimizer=5", "actor.optimizer (5) must be a mapping"),
    ],
)
def test_values_are_not_coerced_silently(override, rule):
    (problem,) = problems_of([], [*REQUIRED, override])
    assert problem.startswith(rule)


def test_a_value_of_several_types_has_one_sentence():
    (problem,) = problems_of([], [*REQUIRED, "--log_prob_diff_alarm.mean=-1"])
    assert problem.startswith("metrics.log_prob_diff_alarm.mean (-1) must be auto or be greater than 0. Meaning: Alarm above")


def test_override_followed_by_another_lacks_its_value():
    assert problems_of([], [*REQUIRED, "--checkpoint.resume", "--run.seed", "3"]) == [
        "--checkpoint.resume needs a value; write --checkpoint.resume VALUE (true or false for a switch)."
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {seed: 1}\ntrain: {num_rollout_steps: 2}\nrun: {seed: 2}\n", "line 3: key run is given twice"),
        ("run:\n  seed: 1\n  seed: 2\n", "line 3: key seed is given twice"),
        ("run: {seed: [1\n", "correct the YAML"),
        ("- run\n", "must hold a mapping of sections at its top, not list"),
        ("1: 2\n", "line 1: a key must be text"),
    ],
)
def test_malformed_file_is_named_with_its_line(tmp_path, text, words):
    file = write(tmp_path, text)
    (problem,) = problems_of([file], REQUIRED)
    assert str(file) in problem and words in problem


def test_every_unreadable_file_is_reported(tmp_path):
    problems = problems_of([tmp_path / "a.yaml", tmp_path / "b.yaml"], REQUIRED)
    assert [str(tmp_path / name) in problem for name, problem in zip(("a.yaml", "b.yaml"), problems, strict=True)] == [True, True]


def test_resolved_config_is_a_config_file_again(tmp_path):
    import json

    config = load_config([], [*REQUIRED, "--lr=3e-7", "--checkpoint.load=a/b", "--actor.megatron_extra.x=[1, 2]"])
    file = write(tmp_path, json.dumps(resolved_dict(config)), "config.json")
    assert load_config([file]) == config


def test_every_leaf_of_the_schema_is_documented():
    undocumented = [field.path for field in config_fields() if not field.meaning and field.name != "type"]
    assert undocumented == []
    assert len({field.path for field in config_fields()}) == len(config_fields())


def test_nearest_orders_by_likeness_and_ignores_strangers():
    assert nearest("temprature", ["temperature", "top_p", "seed"]) == ["temperature"]
    assert nearest("zzz", ["temperature", "top_p"]) == []
