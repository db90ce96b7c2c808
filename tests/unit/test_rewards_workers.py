"""Verifier processes: order, throughput, and what a bad sample costs."""

import asyncio
import os
import pickle
import signal
import textwrap
import time
from pathlib import Path

import pytest

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards.registry import Judge, load_reward_function
from dapo_megatron.rewards.workers import RewardWorkers
from dapo_megatron.types import RewardError, Score

pytestmark = pytest.mark.timeout(120)

USER_MODULE = """
    import os, re, sys, time

    def score(response, answer):
        if response == "exit":
            os._exit(3)
        if response == "kill":
            os.kill(os.getpid(), 9)
        if response == "sys.exit":
            sys.exit("user code")
        if response == "close":
            os.closerange(3, 100)
            time.sleep(60)
        if response == "sleep":
            time.sleep(60)
        if response == "child":
            if os.fork() == 0:
                open(answer, "w").write(str(os.getpid()))
            time.sleep(60)
        if response == "raise":
            raise ValueError("no verdict")
        if response == "memory":
            return len(bytearray(4 << 30))
        if response == "hoard":
            HOARD.append(bytearray(100 << 20))
            return 0.25
        if response == "recursion":
            return score(response, answer)
        if response == "text":
            return "correct"
        if response == "nan":
            return float("nan")
        if response == "modules":
            return float("torch" in sys.modules or "pydantic" in sys.modules)
        return 0.25 if response == answer else -0.5

    HOARD = []

    def backtracking(response, answer):
        return re.fullmatch(r"(a+)+b", response) is not None

    def length(response, answer):
        return float(len(response))

    not_callable = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with reward functions that misbehave on demand."""
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(USER_MODULE))
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "threaded_rewards.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), name='ticker', daemon=True).start()\n"
        "def score(response, answer): return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards"


def custom(function: str, **settings) -> RewardConfig:
    return RewardConfig(type="custom", function=function, **settings)


async def score_once(config: RewardConfig, responses: list[str], answer: str) -> tuple[Score, ...]:
    async with RewardWorkers(config) as workers:
        return await workers.score(responses, answer)


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or a zombie, within five seconds."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


RIGHT, WRONG = Score(1.0, True), Score(-1.0, False)


async def test_scores_come_in_the_order_of_the_responses():
    config = RewardConfig(type="exact", num_workers=3)
    async with RewardWorkers(config) as workers:
        groups = await asyncio.gather(*(workers.score([str(i) for i in range(37)], str(k)) for k in range(20)))
    assert [[score.correct for score in group].index(True) for group in groups] == list(range(20))
    assert all(sum(score.correct for score in group) == 1 for group in groups)


async def test_rewards_of_the_configuration_are_given():
    config = RewardConfig(type="dapo", num_workers=1, correct_reward=2.0, wrong_reward=0.5)
    assert await score_once(config, ["Answer: 3", "Answer: 4"], "3") == (Score(2.0, True), Score(0.5, False))


async def test_no_responses_need_no_verdict():
    assert await score_once(RewardConfig(type="exact", num_workers=1), [], "3") == ()


def test_one_pool_serves_several_event_loops():
    workers = RewardWorkers(RewardConfig(type="exact", num_workers=1))
    try:
        for _ in range(2):
            assert asyncio.run(workers.score(["3", "4"], "3")) == (RIGHT, WRONG)
    finally:
        workers.close()


async def test_expression_that_never_ends_costs_one_sample():
    config = RewardConfig(type="math", num_workers=1, timeout_seconds=3.0)
    responses = [
        "Answer: 34",
        "Answer: 9**9**9**9",
        r"Answer: $\Gamma(10^{10})$",
        r"Answer: $\frac{68}{2}$",
        "x" * 2**20,
        r"\boxed{34}",
    ]
    scores = await score_once(config, responses, "34")
    assert [score.correct for score in scores] == [True, False, False, True, False, True]
    assert [score.error for score in scores] == [
        None,
        None,
        "no answer within 3 s; the verifier process was killed",
        None,
        None,
        None,
    ]
    assert scores[2].reward == -1.0


async def test_catastrophic_regex_costs_one_sample(user_module: str):
    config = custom(f"{user_module}:backtracking", num_workers=2, timeout_seconds=0.5)
    scores = await score_once(config, ["aab", "a" * 60, "ab", "b"], "")
    assert [score.correct for score in scores] == [True, False, True, False]
    assert [score.error is None for score in scores] == [True, False, True, True]


async def test_other_groups_go_on_while_one_hangs(user_module: str):
    async with RewardWorkers(custom(f"{user_module}:score", num_workers=2, timeout_seconds=3.0)) as workers:
        hanging = asyncio.create_task(workers.score(["sleep"], "3"))
        await workers.score(["3"] * 64, "3")
        assert not hanging.done()
        assert (await hanging)[0].error is not None


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("exit", "the verifier process ended with code 3"),
        ("kill", "the verifier process ended with code -9"),
        ("sys.exit", "SystemExit: user code"),
        ("close", "the verifier process ended with code -9"),
        ("sleep", "no answer within 1 s; the verifier process was killed"),
        ("raise", "ValueError: no verdict"),
        ("memory", "MemoryError: "),
        ("recursion", "RecursionError: maximum recursion depth exceeded"),
        ("text", "reward function returned 'correct'; return a Score, a number or a bool"),
        ("nan", "reward function returned the reward nan; it must be finite"),
    ],
)
async def test_misbehaving_function_costs_one_sample(user_module: str, response: str, error: str):
    config = custom(f"{user_module}:score", num_workers=1, timeout_seconds=1.0, memory_limit_mib=256)
    scores = await score_once(config, ["3", response, "4", "3", response, "3"], "3")
    good, bad, lost = Score(0.25, True), Score(-0.5, False), Score(-1.0, False, error)
    assert scores == (good, lost, bad, good, lost, good)


async def test_memory_that_earlier_responses_hold_is_given_back_once_it_runs_out(user_module: str):
    config = custom(f"{user_module}:score", num_workers=1, memory_limit_mib=350)
    scores = await score_once(config, ["hoard"] * 7 + ["3"], "3")
    assert [score.error for score in scores] == [None] * 3 + ["MemoryError: "] + [None] * 3 + [None]
    assert all(score.correct for score in scores if score.error is None)


async def test_a_killed_scorer_is_replaced_without_loading_the_function_again(user_module: str, tmp_path: Path):
    (tmp_path / "counted_rewards.py").write_text(
        f"import os\nopen({str(tmp_path / 'loads')!r}, 'a').write('x')\n"
        "def score(response, answer): return os._exit(1) if response == 'exit' else 1.0\n"
    )
    scores = await score_once(custom("counted_rewards:score", num_workers=2), ["exit", "3"] * 10, "3")
    assert [score.correct for score in scores] == [False, True] * 10
    assert (tmp_path / "loads").read_text() == "x"


async def test_scoring_goes_on_when_all_verifier_processes_are_killed_from_outside(user_module: str):
    async with RewardWorkers(custom(f"{user_module}:score", num_workers=2)) as workers:
        assert (await workers.score(["3"], "3"))[0].correct
        pids = [scorer.pid for scorer in workers._scorers]
        workers._server._process.kill()
        assert all(map(has_ended, pids))
        lost = await workers.score(["3"] * 2, "3")  # one slot for each dead scorer at most
        assert all(score.error is None or score.error == "the verifier process ended with code -9" for score in lost)
        assert all(score.correct for score in await workers.score(["3"] * 32, "3"))


async def test_kill_reaches_what_the_function_started(user_module: str, tmp_path: Path):
    pid_file = tmp_path / "pid"
    await score_once(custom(f"{user_module}:score", num_workers=1, timeout_seconds=1.0), ["child"], str(pid_file))
    pid = int(pid_file.read_text())
    if not has_ended(pid):
        os.kill(pid, signal.SIGKILL)
        pytest.fail(f"process {pid} outlived the verifier that started it")


async def test_start_up_does_not_count_against_the_deadline(user_module: str, tmp_path: Path):
    (tmp_path / "slow_rewards.py").write_text("import time\ntime.sleep(1.0)\ndef score(response, answer): return 1.0\n")
    assert await score_once(custom("slow_rewards:score", num_workers=1, timeout_seconds=0.3), ["3"], "3") == (RIGHT,)


async def test_workers_import_neither_torch_nor_the_configuration(user_module: str):
    assert await score_once(custom(f"{user_module}:score", num_workers=1), ["modules"], "") == (Score(0.0, False),)


async def test_only_the_end_of_a_long_response_is_scored(user_module: str):
    config = custom(f"{user_module}:length", num_workers=1, max_response_chars=1000)
    assert [score.reward for score in await score_once(config, ["x" * 2**20, "x" * 5], "")] == [1000.0, 5.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "set it to `module:function`"),
        ("my_rewards", "must be an import path `module:function`"),
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("broken_rewards:score", "ZeroDivisionError"),
        ("my_rewards:missing", "name a function of my_rewards"),
        ("my_rewards:not_callable", "must be callable as (response, answer)"),
        ("threaded_rewards:score", "starts threads when it is imported (ticker)"),
    ],
)
async def test_function_that_cannot_be_loaded_is_an_error_not_a_hang(user_module: str, function: str | None, message: str):
    async with RewardWorkers(custom(function)) as workers:  # pyright: ignore[reportArgumentType]
        with pytest.raises(RewardError) as ready_error:
            await workers.wait_ready()
        with pytest.raises(RewardError) as score_error:
            await workers.score(["3"] * 20, "3")
    assert message in str(ready_error.value) and message in str(score_error.value)
    assert "reward.function" in str(ready_error.value)


async def test_process_that_dies_while_loading_is_an_error(user_module: str, tmp_path: Path):
    (tmp_path / "dying_rewards.py").write_text("import os\nos._exit(7)\n")
    async with RewardWorkers(custom("dying_rewards:score", num_workers=1)) as workers:
        with pytest.raises(RewardError, match="could not start .*dying_rewards:score.* ended with code 7"):
            await workers.wait_ready()


async def test_close_ends_processes_and_pending_calls(user_module: str):
    workers = RewardWorkers(custom(f"{user_module}:score", num_workers=2, timeout_seconds=60.0))
    await workers.wait_ready()
    pids = [scorer.pid for scorer in workers._scorers]
    pending = asyncio.create_task(workers.score(["sleep"] * 32, "3"))
    await asyncio.sleep(0.1)
    workers.close()
    workers.close()
    with pytest.raises(RewardError, match="closed"):
        await pending
    with pytest.raises(RewardError, match="closed"):
        await workers.score(["3"], "3")
    assert len(pids) == 2 and all(map(has_ended, pids))


async def test_close_during_start_up_leaves_nothing_behind():
    workers = RewardWorkers(RewardConfig(type="math", num_workers=2))
    workers.close()
    assert workers._scorers == set()
    with pytest.raises(RewardError, match="closed"):
        await workers.wait_ready()


async def test_cancelled_call_does_not_disturb_the_others(user_module: str):
    async with RewardWorkers(custom(f"{user_module}:score", num_workers=1, timeout_seconds=1.0)) as workers:
        await workers.wait_ready()
        cancelled = asyncio.create_task(workers.score(["sleep"] * 64, "3"))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        assert await workers.score(["3"], "3") == (Score(0.25, True),)


async def test_a_step_of_256_samples_is_scored_in_full():
    config = RewardConfig(type="math")
    async with RewardWorkers(config) as workers:
        groups = await asyncio.gather(*(workers.score([f"Answer: {i}" for i in range(16)], str(k)) for k in range(16)))
    assert [[score.correct for score in group].index(True) for group in groups] == list(range(16))
    assert all(score.error is None for group in groups for score in group)


def test_judge_turns_verdicts_into_scores():
    def verdict_of(verdict: object) -> Score:
        return Judge(lambda response, answer: verdict, 1.0, -1.0).score("", "")  # pyright: ignore[reportArgumentType]

    assert verdict_of(True) == RIGHT
    assert verdict_of(False) == WRONG
    assert verdict_of(2) == Score(2.0, True)
    assert verdict_of(0.0) == Score(0.0, False)
    assert verdict_of(Score(-0.5, True)) == Score(-0.5, True)
    assert verdict_of(None).error == "reward function returned None; return a Score, a number or a bool"


def test_unknown_type_is_an_error_that_survives_pickling():
    with pytest.raises(RewardError, match="use dapo, math, exact or custom") as error:
        load_reward_function("maths")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
