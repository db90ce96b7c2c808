"""What a response votes for in maj@k."""

import pytest

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards.stated_answer import MAX_ANSWER_CHARS, stated_answer_rule
from dapo_megatron.rewards.workers import RewardWorkers


@pytest.mark.parametrize(
    ("kind", "response", "vote"),
    [
        ("dapo", "so 17 + 17.\nAnswer: $34$", "34"),
        ("dapo", "Answer: 1,234", "1234"),
        ("dapo", r"so \boxed{34}", None),
        ("dapo", "Answer: $ $", None),
        ("math", "**Answer:** 34.", "34"),
        ("math", r"so \boxed{\text{34}}", "34"),
        ("math", "no idea", None),
        ("exact", " 7 \n", "7"),
        ("exact", " \n", None),
        ("custom", "Answer: 34", None),
    ],
)
def test_votes_have_the_form_in_which_the_reward_rule_compares(kind, response, vote):
    assert stated_answer_rule(kind)(response) == vote


@pytest.mark.parametrize("kind", ["dapo", "math", "exact"])
def test_an_endless_answer_is_no_vote(kind):
    short, long = (f"Answer: {'9' * length}"[-length if kind == "exact" else None :] for length in (250, 10**6))
    assert stated_answer_rule(kind)(short) == "9" * 250
    assert stated_answer_rule(kind)(long) is None
    assert MAX_ANSWER_CHARS >= 250


async def test_verdicts_carry_the_vote():
    async with RewardWorkers(RewardConfig(type="dapo", num_workers=1)) as workers:
        scores = await workers.score(["Answer: 34", "Answer: $39$", "none"], "34")
    assert [(score.correct, score.answer) for score in scores] == [(True, "34"), (False, "39"), (False, None)]
