"""Policies of several tasks side by side in processes: the numbers of `evaluate`, and no process left behind."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pwm_fast.envs import registry
from pwm_fast.envs.evaluation import GROUP, evaluate, evaluate_population
from pwm_fast.envs.processes import Workers


@pytest.fixture(autouse=True)
def suites():
    for package in ("dm_control", "metaworld"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra mt80)")


def linear(name):
    """A policy that is a function of the observation."""
    task = registry.get(name)
    weights = np.random.default_rng(1).normal(size=(task.obs_dim, task.action_dim)) / 3
    return lambda obs: np.tanh(obs @ weights)


def children():
    """Processes that this one has started and that still run."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if "spawn_main" in line]


def equal(one, other):
    assert (one.returns == other.returns).all() and (one.lengths == other.lengths).all()
    assert (one.successes is None) == (other.successes is None)
    assert one.successes is None or (one.successes == other.successes).all()
    for mine, yours in zip(one.episodes or (), other.episodes or (), strict=True):
        assert all(np.array_equal(getattr(mine, key), getattr(yours, key)) for key in ("obs", "action", "reward"))
        assert mine.terminated == yours.terminated


def test_tasks_of_all_suites_give_what_evaluate_gives_whatever_the_processes():
    """With recordings; two policies for one task; the hopper falls, so its episodes end at different times."""
    names = ["mw-reach", "gym:Pendulum-v1", "hopper", "gym:Pendulum-v1", "pendulum-spin"]
    policies = [linear(name) for name in names[:3]] + [lambda obs: -obs[:, :1], linear("pendulum-spin")]
    found = evaluate_population(names, policies, 2, seed=4, record=True, processes=2)
    assert len(found) == 5 and not children()
    for name, policy, results in zip(names, policies, found):
        equal(results, evaluate(name, policy, 2, seed=4, record=True, threads=1))
    assert found[2].episodes[0].terminated


def test_many_episodes_go_in_groups_and_one_process_gives_the_same():
    count, sizes = GROUP + 2, []

    def policy(obs):
        sizes.append(len(obs))
        return obs[:, :1]

    (found,) = evaluate_population(["gym:Pendulum-v1"], [policy], count, seed=0, processes=1)
    assert set(sizes) == {GROUP, 2} and found.returns.shape == (count,)
    assert (found.returns == evaluate("gym:Pendulum-v1", policy, count, seed=0).returns).all()


def test_nothing_to_do_and_bad_calls():
    assert evaluate_population([], [], 3, seed=0) == []
    with pytest.raises(ValueError, match="each task needs its policy: got 1 tasks and 2 policies"):
        evaluate_population(["mw-reach"], [linear("mw-reach")] * 2, 1, seed=0)
    with pytest.raises(registry.UnknownTask, match="did you mean 'mw-reach'"):
        evaluate_population(["mw-reech"], [linear("mw-reach")], 1, seed=0)
    for name in ("episodes", "processes"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            evaluate_population(["mw-reach"], [linear("mw-reach")], **{"episodes": 1, "seed": 0, name: 0})


def test_bad_actions_say_whose_and_leave_no_process():
    for action, text in [(np.zeros((1, 3)), r"must have shape \(1, 1\)"), (np.full((1, 1), np.nan), "must be finite")]:
        with pytest.raises(ValueError, match=f"gym:Pendulum-v1: action {text}"):
            evaluate_population(["gym:Pendulum-v1"], [lambda obs, action=action: action], 1, seed=0)
        assert not children()


def test_an_error_inside_a_process_comes_out_here_and_ends_them_all():
    """The task's environment cannot be made there: its package is unknown."""
    task = registry.Task("gym:None-v0", "gymnasium", "None-v0", 3, 1, 200, None, None)
    with pytest.raises(registry.UnknownTask, match="unknown Gymnasium environment 'None-v0'"):
        evaluate_population([task, "gym:Pendulum-v1"], [lambda obs: obs[:, :1]] * 2, 1, seed=0, processes=2)
    assert not children()


def test_a_killed_process_is_reported():
    with pytest.raises(RuntimeError, match="exit code -9"), Workers(1, 1, 3, 1) as workers:
        workers.begin(0, registry.get("gym:Pendulum-v1"), 1, [0])
        workers.first_obs(0)
        os.kill(workers._workers[0].processes[0].pid, signal.SIGKILL)
        workers._workers[0].processes[0].join()
        workers.act(0, np.zeros((1, 1)))
        workers.stepped(0)
    assert not children()


def test_the_end_of_an_idle_process_disturbs_nobody():
    with Workers(2, 1, 3, 1) as workers:
        workers._workers[1].processes[0].kill()
        workers._workers[1].processes[0].join()
        workers.begin(0, registry.get("gym:Pendulum-v1"), 1, [0])
        assert workers.ready([0]) == [0] and workers.first_obs(0).shape == (1, 3)
        with pytest.raises(RuntimeError, match="exit code -9"):
            workers.begin(1, registry.get("gym:Pendulum-v1"), 1, [0])


PROGRAM = """
import os, sys, time
from pwm_fast.envs.evaluation import evaluate_population

def policy(obs):
    print("running", flush=True)
    time.sleep(0.2)
    return obs[:, :1]

if __name__ == "__main__":
    evaluate_population(["gym:Pendulum-v1"] * 2, [policy] * 2, 1, seed=0, processes=2)
"""


def test_a_script_without_its_guard_is_told_so(tmp_path):
    script = tmp_path / "unguarded_script.py"
    script.write_text(PROGRAM.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: an environment process could not start" in done.stderr
    assert "running" not in done.stdout


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_kill_leave_no_process(end, tmp_path):
    """Ctrl-C goes to the whole group, as a terminal sends it; a kill to the one process alone."""
    script = tmp_path / "evaluation_script.py"
    script.write_text(PROGRAM)
    running = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert running.stdout.readline() == "running\n"
    group = os.getpgid(running.pid)
    if end == signal.SIGINT:
        os.killpg(group, end)
    else:
        running.kill()
    running.communicate(timeout=60)
    assert running.returncode != 0
    until = time.monotonic() + 60
    while left := group_members(group):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def heed_ctrl_c():
    """A shell starts what it runs in the background, tests perhaps, deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def group_members(group):
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(group) and "Z" not in line.split()[1]]
