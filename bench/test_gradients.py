"""Are the world model's derivatives right? Against the simulator's own, on states and actions of the shipped episodes.

    pytest bench/test_gradients.py -s
    PWM_FAST_STORE=DIR PWM_FAST_SECONDS=600 pytest bench/test_gradients.py -s -k kinds

Extraction follows d(return)/d(action), so this, not the prediction error, says whether a model can improve a policy.
For 512 humanoid states, the cosine between the model's and the simulator's gradient of sum_{k=1..15} r_k by the first
action, state by state (the median is printed) and of the mean over the states; 1 is perfect, 0 says nothing, and below
0 a policy gets worse. `kinds` trains both kinds of latent state on the same data (the shipped episodes, or those of
PWM_FAST_STORE) for the same CPU seconds (120 each, or PWM_FAST_SECONDS).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pwm_fast.data.episodes import EpisodeStore
from pwm_fast.data.packed import unpack
from pwm_fast.envs.dflex import DifferentiableEnv
from pwm_fast.learning.pretraining import PRESETS
from pwm_fast.learning.store_training import StoreTraining
from pwm_fast.models.world_model import LATENTS, WorldModel, WorldModelConfig
from pwm_fast.shipped import shipped

STATES, STEPS = 512, 16
pytestmark = pytest.mark.timeout(0)


class Reference(NamedTuple):
    """What happened and what the simulator says of it."""

    obs: Tensor  # [N, S]
    action: Tensor  # [STEPS, N, A]
    gradient: Tensor  # [N, A] of the summed rewards 1 .. STEPS - 1 by action 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    found = shipped("humanoid")
    assert found is not None
    return unpack(found.episodes, tmp_path_factory.mktemp("episodes") / "store")


@pytest.fixture(scope="module")
def reference(store: EpisodeStore) -> Reference:
    """The first STEPS steps of pieces that nobody fell in, best episodes first."""
    rank = np.argsort(store.meta["episode_return"])[::-1]
    whole = [i for i in rank if store.lengths[i] >= STEPS and not store.episode(int(i))["terminated"].any()][:STATES]
    pieces = [store.episode(int(i)) for i in whole]
    obs = torch.from_numpy(np.stack([p["obs"][0] for p in pieces]))
    action = torch.from_numpy(np.stack([p["action"][:STEPS] for p in pieces], 1)).requires_grad_()
    recorded = torch.from_numpy(np.stack([p["reward"][:STEPS] for p in pieces], 1))
    env = DifferentiableEnv("humanoid", len(pieces), early_termination=False, action_in_obs=True, threads=1)
    env.set_state(*state_of(obs))
    reward = torch.stack([env.step(a)[1] for a in action])
    assert np.corrcoef(reward.detach().flatten(), recorded.flatten())[0, 1] > 0.95, "it is another trajectory"
    return Reference(obs, action.detach(), torch.autograd.grad(reward[1:].sum(), action)[0][0])


def state_of(obs: Tensor) -> tuple[Tensor, Tensor]:
    """joint_q [N, 28] and joint_qd [N, 27] at x = z = 0 that show these observations (SPEC: humanoid)."""
    q, qd = torch.zeros(len(obs), 28), torch.zeros(len(obs), 27)
    q[:, 1], q[:, 3:7], q[:, 7:] = obs[:, 0], F.normalize(obs[:, 1:5]), obs[:, 11:32]
    qd[:, :3], qd[:, 6:] = obs[:, 8:11], 10 * obs[:, 32:53]
    qd[:, 3:6] = obs[:, 5:8] - torch.linalg.cross(qd[:, :3], q[:, :3])
    return q, qd


def agreement(model: WorldModel, reference: Reference) -> tuple[float, float]:
    """Cosine of the gradients: median over the states, and of their means."""
    action = reference.action.clone().requires_grad_()
    z, total = model.encode(reference.obs), torch.zeros(())
    for k in range(STEPS):
        total = total + model.reward(z, action[k]).sum() * (k > 0)
        z = model.next(z, action[k])
    found = torch.autograd.grad(total, action)[0][0]
    each = F.cosine_similarity(found, reference.gradient, dim=1).median()
    mean = F.cosine_similarity(found.mean(0), reference.gradient.mean(0), dim=0)
    return each.item(), mean.item()


def test_shipped_world_model(reference: Reference, record_property: Callable) -> None:
    found = shipped("humanoid")
    assert found is not None
    each, mean = agreement(WorldModel.load(found.world_model), reference)
    print(
        f"\nshipped: gradient cosine with the simulator {each:.2f} (median of {STATES} states), of the mean {mean:.2f}"
    )
    record_property("cosine", each)
    assert each > 0.5 and mean > 0.7


def test_kinds_of_latent_states(reference: Reference, store: EpisodeStore, record_property: Callable) -> None:
    given = os.environ.get("PWM_FAST_STORE")
    data, seconds = EpisodeStore.open(Path(given)) if given else store, float(os.environ.get("PWM_FAST_SECONDS", "120"))
    cosines = {}
    for latent in LATENTS:
        torch.manual_seed(0)
        config = WorldModelConfig.of_size("5M", 76, 21, latent, termination_dim=128)
        training = StoreTraining(data, WorldModel(config), PRESETS[latent])
        begun, learner = time.process_time(), training.pretraining
        while time.process_time() - begun < seconds:
            learner.step()
        each, mean = agreement(learner.model, reference)
        error = training.validate()
        cosines[latent] = each
        record_property(latent, each)
        print(
            f"\n{latent:>11}: {learner.step_count} steps in {seconds:.0f} CPU seconds; gradient cosine {each:.2f}, of "
            f"the mean {mean:.2f}; 16-step latent error {error['latent_error']:.3f}, return R2 {error['return_r2']:.3f}"
        )
    assert cosines["observation"] > cosines["simnorm"]
