"""From rows to tokenised prompts, with an account of every row that was left out."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import jinja2
import xxhash

from dapo_megatron.config.schema import DataConfig
from dapo_megatron.data.columns import ColumnReader, MalformedRowError, Messages
from dapo_megatron.data.sources import read_rows
from dapo_megatron.types import DataError, Prompt

_NUM_PROBLEMS_REPORTED = 5
_TOKENIZER_BATCH_ROWS = 1024
_PLACEHOLDER = "{problem}"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        """With `tokenize=False`, the rendered text."""

    def __call__(self, text: Any, *, add_special_tokens: bool) -> Any:
        """For a list of texts, a mapping whose `input_ids` hold one list of ids per text."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the rows: num_rows = prompts + num_malformed + num_too_long + num_duplicates."""

    num_rows: int
    num_malformed: int
    num_too_long: int
    num_duplicates: int
    first_problems: tuple[str, ...]
    """Place and fault of the first malformed rows, at most 5."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in the order of their rows. `fingerprint` is the xxh3-128 of all they hold, in hexadecimal."""

    prompts: tuple[Prompt, ...]
    report: DataReport
    fingerprint: str


def load_prompts(config: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    """Read, check, render and tokenise the prompts of `data.path`.

    With `data.chat_template` the text is what the template renders, generation prompt included, and has the special tokens that
    the template writes. Without it the text is the problem in `data.prompt_template`, tokenised with the special tokens
    that the tokenizer adds by itself (a BOS for Llama, none for Qwen). A row that equals an earlier one in problem and
    answer is left out. Raises DataError when the source, a setting or too many rows are unusable.
    """
    _check_templates(config, tokenizer)
    tally = _Tally()
    prompts: list[Prompt] = []
    num_too_long = 0
    for batch in itertools.batched(_render_rows(config, tokenizer, tally), _TOKENIZER_BATCH_ROWS):
        encoded = tokenizer([row.text for row in batch], add_special_tokens=not config.chat_template)
        for row, token_ids in zip(batch, encoded["input_ids"], strict=True):
            if len(token_ids) > config.max_prompt_tokens:
                num_too_long += 1
            else:
                prompts.append(Prompt(row.index, tuple(token_ids), row.text, row.answer))
    report = DataReport(tally.num_rows, tally.num_malformed, num_too_long, tally.num_duplicates, tuple(tally.first_problems))
    _check_report(config, report, len(prompts))
    return PromptSet(tuple(prompts), report, _fingerprint(prompts))


@dataclass(frozen=True, slots=True)
class _RenderedRow:
    index: int
    text: str
    answer: str


@dataclass(slots=True)
class _Tally:
    num_rows: int = 0
    num_malformed: int = 0
    num_duplicates: int = 0
    first_problems: list[str] = field(default_factory=list)

    def add_malformed(self, place: str, fault: MalformedRowError) -> None:
        self.num_malformed += 1
        if len(self.first_problems) < _NUM_PROBLEMS_REPORTED:
            self.first_problems.append(f"{place}: {fault}")


def _render_rows(config: DataConfig, tokenizer: Tokenizer, tally: _Tally) -> Iterator[_RenderedRow]:
    """Well-formed rows, the first of each kind, as text; the others are tallied."""
    reader = ColumnReader(config)
    seen: set[tuple[str | Messages, str]] = set()
    for row in read_rows(config):
        tally.num_rows += 1
        try:
            problem, answer = reader.read(row)
            if (problem, answer) in seen:
                tally.num_duplicates += 1
                continue
            text = _render(config, tokenizer, problem)
        except MalformedRowError as fault:
            tally.add_malformed(row.place, fault)
            continue
        seen.add((problem, answer))
        yield _RenderedRow(row.index, text, answer)


def _render(config: DataConfig, tokenizer: Tokenizer, problem: str | Messages) -> str:
    if isinstance(problem, str):
        # not str.format: problems and templates hold the braces of LaTeX
        text = config.prompt_template.replace(_PLACEHOLDER, problem)
        if not config.chat_template:
            return text
        messages: Messages = (("user", text),)
    else:
        messages = problem
        if not config.chat_template:
            if len(messages) > 1:
                raise MalformedRowError(f"holds {len(messages)} chat messages, which need data.chat_template: true")
            return messages[0][1]
    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise MalformedRowError(f"the chat template refuses the messages ({error})") from error


def _check_templates(config: DataConfig, tokenizer: Tokenizer) -> None:
    if _PLACEHOLDER not in config.prompt_template:
        raise DataError(
            f"data.prompt_template ({config.prompt_template!r}) must hold {_PLACEHOLDER}, where the problem goes; add it."
        )
    if config.chat_template and not tokenizer.chat_template:
        raise DataError(
            "data.chat_template is true but the tokenizer of model.path has no chat template; "
            "set data.chat_template to false, or use a model whose tokenizer has one."
        )


def _check_report(config: DataConfig, report: DataReport, num_prompts: int) -> None:
    if report.num_rows == 0:
        raise DataError(f"data.path ({config.path}) holds no rows; give a source with at least one.")
    if report.num_malformed > config.max_malformed_fraction * report.num_rows:
        problems = "\n".join(f"  {problem}" for problem in report.first_problems)
        raise DataError(
            f"{report.num_malformed} of {report.num_rows} rows of data.path ({config.path}) are malformed, more than "
            f"data.max_malformed_fraction ({config.max_malformed_fraction:g}) allows; correct the rows or the columns in "
            f"the data section. The first:\n{problems}"
        )
    if num_prompts == 0:
        raise DataError(
            f"no prompt of data.path ({config.path}) is left: of {report.num_rows} rows {report.num_malformed} are malformed and "
            f"{report.num_too_long} longer than data.max_prompt_tokens ({config.max_prompt_tokens}); raise that."
        )


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        for part in (prompt.text.encode("utf-8", "surrogatepass"), prompt.answer.encode("utf-8", "surrogatepass")):
            digest.update(array("q", (prompt.index, len(part))).tobytes())
            digest.update(part)
        digest.update(array("q", (len(prompt.token_ids), *prompt.token_ids)).tobytes())
    return digest.hexdigest()
