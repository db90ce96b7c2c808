"""Rows become prompts; those that cannot are counted and named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dapo_megatron.config.schema import DataConfig
from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.types import DataError

DATA_FOLDER = Path(os.environ.get("DAPO_MEGATRON_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS = "\x01"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII, a BOS that the tokenizer adds by itself, a chat template."""
    characters = [BOS, "\n", *map(chr, range(32, 127)), "\x02"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="\x02"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, unk_token="\x02", chat_template=CHAT_TEMPLATE)


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def raw(path: str, **settings: Any) -> DataConfig:
    return DataConfig(path=path, chat_template=False, **settings)


def test_chat_template_wraps_a_plain_problem(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = write_lines(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "2"}])
    template = "Think about {problem}, in \\boxed{}."
    (prompt,) = load_prompts(DataConfig(path=path, prompt_template=template), tokenizer).prompts
    assert prompt.text == "<user>Think about 1+1?, in \\boxed{}.\n<assistant>"
    assert (prompt.index, prompt.answer) == (0, "2")
    conversation = [{"role": "user", "content": "Think about 1+1?, in \\boxed{}."}]
    encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    assert list(prompt.token_ids) == encoded["input_ids"]
    assert tokenizer.bos_token_id not in prompt.token_ids


def test_chat_messages_go_through_the_template_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": messages, "reward_model": {"ground_truth": "2", "style": "rule"}}])
    (prompt,) = load_prompts(DataConfig(path=path, prompt_template="ignored {problem}"), tokenizer).prompts
    assert (prompt.text, prompt.answer) == ("<system>Be brief.\n<user>1+1?\n<assistant>", "2")


def test_raw_prompt_has_the_tokens_that_the_tokenizer_adds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "1,2>", "answer": 2}])
    (prompt,) = load_prompts(raw(path), tokenizer).prompts
    assert (prompt.text, prompt.answer) == ("1,2>", "2")
    assert list(prompt.token_ids) == tokenizer("1,2>")["input_ids"]
    assert prompt.token_ids[0] == tokenizer.bos_token_id and len(prompt.token_ids) == 5


def test_braces_of_latex_survive_in_template_and_problem(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    problem = r"What is \frac{1}{2} of {problem} {0}?"
    path = write_lines(tmp_path / "a.jsonl", [{"problem": problem, "answer": "1"}])
    (prompt,) = load_prompts(raw(path, prompt_template=r"\boxed{x} {problem}"), tokenizer).prompts
    assert prompt.text == r"\boxed{x} " + problem


def test_answer_is_searched_with_the_pattern_and_loses_thousands_commas(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [
        {"question": "a", "answer": "48/2 = 24\n#### 72"},
        {"question": "b", "answer": "#### 1,234,567"},
        {"question": "c", "answer": "#### (1,23)"},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    prompts = load_prompts(raw(path, answer_pattern=r"####\s*(\S+)"), tokenizer).prompts
    assert [prompt.answer for prompt in prompts] == ["72", "1234567", "(1,23)"]


@pytest.mark.parametrize(
    ("row", "prompt_field", "answer_field"),
    [
        ({"q": {"text": "1+1?"}, "a": {"b": {"c": "2"}}}, "q.text", "a.b.c"),
        ({"q.text": "1+1?", "a": "2"}, "q.text", "a"),
        ({"prompt": "1+1?", "problem": "not this", "question": "not this", "answer": "2"}, None, None),
        ({"problem": "1+1?", "question": "not this", "answer": "not this", "reward_model": {"ground_truth": "2"}}, None, None),
        ({"prompt": "not this", "problem": "1+1?", "answer": "not this", "solution": "2"}, "problem", "solution"),
    ],
)
def test_columns_are_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict, prompt_field: str | None, answer_field: str | None
):
    path = write_lines(tmp_path / "a.jsonl", [row])
    (prompt,) = load_prompts(raw(path, prompt_field=prompt_field, answer_field=answer_field), tokenizer).prompts
    assert (prompt.text, prompt.answer) == ("1+1?", "2")


def test_parquet_with_the_columns_of_dapo_math_17k(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def row(problem: str, answer: str) -> dict:
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": problem, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        }

    path = tmp_path / "dapo.parquet"
    rows = [row("1+1?", "2"), row("2+2?", "4")] * 100
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    prompt_set = load_prompts(DataConfig(path=str(path)), tokenizer)
    assert [(p.index, p.text, p.answer) for p in prompt_set.prompts] == [
        (0, "<user>1+1?\n<assistant>", "2"),
        (1, "<user>2+2?\n<assistant>", "4"),
    ]
    assert (prompt_set.report.num_rows, prompt_set.report.num_duplicates) == (200, 198)


def test_malformed_rows_are_counted_and_named_by_file_and_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [
        {"problem": "good", "answer": "1"},
        "{not json",
        "",
        "[1, 2]",
        {"answer": "3"},
        {"problem": "no answer", "answer": " "},
        {"problem": " ", "answer": "1"},
        {"problem": "null answer", "answer": None},
        {"problem": [{"role": "user"}], "answer": "1"},
        {"problem": "also good", "answer": "2"},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    prompt_set = load_prompts(raw(path, max_malformed_fraction=0.8), tokenizer)
    assert [(p.index, p.text) for p in prompt_set.prompts] == [(0, "good"), (8, "also good")]
    assert (prompt_set.report.num_rows, prompt_set.report.num_malformed) == (9, 7)
    problems = prompt_set.report.first_problems
    assert [problem.removeprefix(path).split(":")[1] for problem in problems] == ["2", "4", "5", "6", "7"]
    faults = ["not JSON", "not an object", "no column problem among ['answer']", "answer in column answer is empty"]
    assert all(fault in problem for fault, problem in zip([*faults, "problem in column problem is empty"], problems, strict=True))


@pytest.mark.parametrize("line", [b'{"problem": "\xff", "answer": "1"}', b"[" * 100_000, b"3"])
def test_odd_bytes_are_malformed_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"problem": "good", "answer": "1"}')
    report = load_prompts(raw(str(path), max_malformed_fraction=0.5), tokenizer).report
    assert (report.num_rows, report.num_malformed) == (2, 1)


def test_too_many_malformed_rows_are_fatal(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = write_lines(tmp_path / "a.jsonl", [{"problem": str(i), "answer": "1"} for i in range(98)] + ["x", "y"])
    assert len(load_prompts(raw(path, max_malformed_fraction=0.02), tokenizer).prompts) == 98
    with pytest.raises(DataError) as error:
        load_prompts(raw(path), tokenizer)
    assert "2 of 100 rows" in str(error.value) and "data.max_malformed_fraction (0.01)" in str(error.value)
    assert f"{path}:99: not JSON" in str(error.value)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "1+1?", "answer": "2"}, {}, "none of the columns prompt, problem, question among ['text', 'answer']"),
        ({"prompt": "1+1?", "label": "2"}, {}, "set data.answer_field"),
        ({"prompt": "1+1?", "answer": "2"}, {"prompt_field": "problem"}, "no column problem among ['prompt', 'answer']"),
        ({"prompt": "1+1?", "answer": "2"}, {"answer_field": "answer.x"}, "no column answer.x"),
        ({"prompt": "1+1?", "answer": "2"}, {"answer_pattern": "#### (.*)"}, "data.answer_pattern finds nothing"),
        ({"prompt": "1+1?", "answer": True}, {}, "holds True, which is neither text nor a number"),
        ({"prompt": 3, "answer": "2"}, {}, "column prompt holds 3, which is neither text nor chat messages"),
        (
            {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "answer": "2"},
            {},
            "2 chat messages, which need data.chat_template: true",
        ),
        (
            {"prompt": [{"role": "tool", "content": "a"}], "answer": "2"},
            {"chat_template": True},
            "the chat template refuses the messages (no tools here)",
        ),
    ],
)
def test_unusable_rows_say_why(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict, settings: dict[str, Any], message: str
):
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as error:
        load_prompts(DataConfig(**{"path": path, "chat_template": False, **settings}), tokenizer)
    assert f"{path}:1: " in str(error.value) and message in str(error.value)


def test_single_message_needs_no_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}])
    assert load_prompts(raw(path), tokenizer).prompts[0].text == "1+1?"


def test_long_prompts_are_left_out_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "x" * n, "answer": "1"} for n in (8, 9, 10, 11)])
    prompt_set = load_prompts(raw(path, max_prompt_tokens=10), tokenizer)  # with the BOS
    assert [len(prompt.token_ids) for prompt in prompt_set.prompts] == [9, 10]
    assert prompt_set.report.num_too_long == 2
    with pytest.raises(DataError, match=r"4 longer than data.max_prompt_tokens \(5\); raise that"):
        load_prompts(raw(path, max_prompt_tokens=5), tokenizer)


def test_duplicates_are_left_out_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": p, "answer": a} for p, a in [("a", "1"), ("a", "2"), ("a", "1"), ("b", "1")]]
    prompt_set = load_prompts(raw(write_lines(tmp_path / "a.jsonl", rows)), tokenizer)
    assert [(p.index, p.text, p.answer) for p in prompt_set.prompts] == [(0, "a", "1"), (1, "a", "2"), (3, "b", "1")]
    assert prompt_set.report.num_duplicates == 1


def test_fingerprint_tells_contents_apart_and_not_places(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": "ab", "answer": "c"}, {"prompt": "d", "answer": "e"}]
    fingerprint = load_prompts(raw(write_lines(tmp_path / "a.jsonl", rows)), tokenizer).fingerprint
    assert load_prompts(raw(write_lines(tmp_path / "b.jsonl", rows)), tokenizer).fingerprint == fingerprint
    changed = [[{"prompt": "a", "answer": "bc"}, rows[1]], rows[::-1], rows[:1]]
    others = {load_prompts(raw(write_lines(tmp_path / "c.jsonl", other)), tokenizer).fingerprint for other in changed}
    assert len(others | {fingerprint}) == 4


def test_model_without_chat_template_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="set data.chat_template to false"):
        load_prompts(DataConfig(path=path), bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "missing.jsonl"}, "does not exist as a file"),
        ({"path": "./missing"}, "does not exist as a file"),
        ({"path": "/no/such/folder"}, "does not exist as a file"),
        ({"path": "rows.csv"}, "must end in .jsonl, .json or .parquet"),
        ({"path": "bad.parquet"}, "is not readable as parquet"),
        ({"path": "empty.jsonl"}, "holds no rows"),
        ({"path": "rows.jsonl", "prompt_template": "no place"}, "must hold {problem}"),
        ({"path": "rows.jsonl", "answer_pattern": "#### .*"}, "must have a group"),
        ({"path": "rows.jsonl", "answer_pattern": "("}, "is no regular expression"),
    ],
)
def test_unusable_source_or_setting_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "1"}])
    for name in ("rows.csv", "bad.parquet", "empty.jsonl"):
        (tmp_path / name).write_text("" if name == "empty.jsonl" else "a,b\n")
    with pytest.raises(DataError) as error:
        load_prompts(DataConfig(**{"chat_template": False, **settings}), tokenizer)
    assert message in str(error.value)


def test_hub_data_set_that_cannot_be_loaded_is_an_error(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def refuse(path: str, split: str) -> None:
        raise ConnectionError(f"{path} is out of reach")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"data.path \(owner/name\).*split test.*out of reach.*download the data set"):
        load_prompts(raw("owner/name", split="test"), tokenizer)


def test_hub_data_set_is_read_by_rows(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    import datasets

    data_set = datasets.Dataset.from_list([{"question": "a", "answer": "1"}, {"question": "b", "answer": ""}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: data_set)
    prompt_set = load_prompts(raw("owner/name", max_malformed_fraction=0.5), tokenizer)
    assert [prompt.text for prompt in prompt_set.prompts] == ["a"]
    assert prompt_set.report.first_problems == ("owner/name[train] row 1: the answer in column answer is empty",)


@pytest.mark.parametrize(
    ("name", "settings", "num_prompts", "first_answer"),
    [
        ("gsm8k_test.jsonl", {"answer_pattern": r"####\s*(\S+)"}, 1319, "18"),
        ("aime2024.jsonl", {}, 30, "204"),
        ("aime2024_dapo.jsonl", {}, 30, "540"),
        ("math500.jsonl", {}, 500, r"\left( 3, \frac{\pi}{2} \right)"),
    ],
)
def test_real_files_load_in_full(
    tokenizer: PreTrainedTokenizerFast, name: str, settings: dict[str, Any], num_prompts: int, first_answer: str
):
    path = DATA_FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is missing; set DAPO_MEGATRON_TEST_DATA to the folder of the data files")
    prompt_set = load_prompts(DataConfig(path=str(path), max_prompt_tokens=10_000, **settings), tokenizer)
    assert (len(prompt_set.prompts), prompt_set.prompts[0].answer) == (num_prompts, first_answer)
    assert (prompt_set.report.num_malformed, prompt_set.report.num_duplicates) == (0, 0)


def test_data_imports_neither_torch_nor_transformers():
    code = (
        "import sys, dapo_megatron.data.loader\n"
        "sys.exit(','.join(m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
