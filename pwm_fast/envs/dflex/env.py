"""A batch of environments of one task, differentiable in torch from state and action to observation and reward."""

import torch
from torch import Tensor

from pwm_fast.envs.dflex.model import load_model
from pwm_fast.envs.dflex.rows import Stages
from pwm_fast.envs.dflex.simulator import Simulator
from pwm_fast.envs.dflex.tasks import DflexTask, get_task

KEPT = ("q", "qd", "action", "progress", "obs", "episode", "starts_q", "starts_qd")
STARTS = 8  # start states drawn ahead for every environment: drawing one at a time costs as much as a step of many


class DifferentiableEnv:
    """``num_envs`` copies of a task.

    ``step(action)`` clips action [N, A] to [-1, 1], simulates 1/60 s and returns ``obs [N, S], reward [N], terminated
    [N], truncated [N], info``. The reward is that of the observation before the step. Finished environments (fallen, or
    1000 steps old) are reset at once: ``obs`` then is the first of the next episode and ``info["final_obs"]`` the last
    of the old one (``info["final_q"]``: its joint_q). A state that stops being finite, or exceeds 1e6, ends its episode
    as terminated; its ``final_obs`` repeats the last sane one.

    Gradients flow when grad mode is on and the action or the state requires them; otherwise nothing is saved for
    backward. ``initialize_trajectory()`` keeps the state and cuts the graph; a restart cuts that of its environment.
    Non-finite entries of the gradients that a step passes back to action and state become 0, for every task (friction
    has unbounded derivatives where sliding stops; dflex does this for ANYmal and the humanoids only).

    ``action_in_obs``: whether the observation's last entries show the action just applied (Ant, Humanoid, ANYmal). None
    reproduces dflex: shown only where no graph is recorded, else 0. Pass True or False to get the same either way.
    ``recentre``: simulate relative to each robot's own place; the same dynamics, but float32 keeps its digits far from
    the origin.
    """

    q: Tensor  # [N, nq]
    qd: Tensor  # [N, nqd]
    action: Tensor  # [N, A] the last one, clipped
    progress: Tensor  # [N] steps since the episode began
    obs: Tensor  # [N, S]

    def __init__(
        self,
        task: str | DflexTask,
        num_envs: int,
        device: str = "cpu",
        seed: int = 0,
        early_termination: bool = True,
        threads: int | None = None,
        *,
        stochastic_reset: bool = True,
        action_in_obs: bool | None = None,
        recentre: bool = True,
        episode_length: int | None = None,
    ):
        self.task = get_task(task)
        self.model = load_model(self.task.model)
        self.device = torch.device(device)
        if self.device.type != "cpu":
            raise ValueError(f"device must be 'cpu', got {device!r}: the robots run on CPU threads")
        self.num_envs, self.obs_dim, self.action_dim = num_envs, self.task.obs_dim, self.task.action_dim
        self.episode_length = episode_length or self.task.episode_length
        self.early_termination, self.stochastic_reset = early_termination, stochastic_reset
        self.action_in_obs, self.recentre = action_in_obs, recentre
        self.generator = torch.Generator().manual_seed(seed)
        self._start_q = torch.from_numpy(self.model.start_q)
        # torque of each joint, or tension of each muscle, at action 1
        torque, tension = torch.tensor(self.task.torque), torch.from_numpy(self.model.tension)
        self._full_command = tension if len(tension) else torque
        terms = {
            **self.task.terms(),
            "full": self._full_command.numpy(),
            "early_termination": early_termination,
            "episode_length": self.episode_length,
        }
        stages = Stages(self.task.observes, terms, (self.action_dim, self.obs_dim, STARTS))
        self.simulator = Simulator(self.model, num_envs, self.task.substeps, self.task.refresh, threads, stages)
        # with SNU's unnormalised quaternions the dynamics depend on the origin right after a reset
        self._recentre = (2 if self.model.has_ball_joints else 1) if recentre else 0
        self.reset()

    # -- state ---------------------------------------------------------------------------------------------------------

    def reset(self) -> Tensor:
        """Start new episodes everywhere; obs [N, S]."""
        self._place(*self._start_states(self.num_envs))
        self._draw_starts()
        return self.obs

    def set_state(self, joint_q: Tensor, joint_qd: Tensor) -> Tensor:
        """Put the robots at joint_q [N, nq], joint_qd [N, nqd], at the start of an episode; obs [N, S]."""
        expected = {"joint_q": (self.num_envs, self.model.nq), "joint_qd": (self.num_envs, self.model.nqd)}
        for (name, shape), value in zip(expected.items(), (joint_q, joint_qd)):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds non-finite numbers")
        self._place(joint_q.float().clone(), joint_qd.float().clone())
        return self.obs

    def state(self) -> tuple[Tensor, Tensor]:
        """(joint_q [N, nq], joint_qd [N, nqd]), connected to the graph if one is being recorded."""
        return self.q, self.qd

    def initialize_trajectory(self) -> Tensor:
        """Keep the state, cut the graph; obs [N, S]."""
        self.q, self.qd, self.action = self.q.detach(), self.qd.detach(), self.action.detach()
        self.obs = self._observe(recording=torch.is_grad_enabled())
        return self.obs

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later exact continuation needs, random numbers included."""
        kept = {name: getattr(self, name).detach().clone() for name in KEPT}
        return {**kept, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue exactly where state_dict() was taken. Raises ValueError for another task's or batch size's."""
        for name in KEPT:
            if name not in state:
                raise ValueError(f"saved state has no '{name}': it was saved by an older version; start anew")
            expected, got = tuple(getattr(self, name).shape), tuple(state[name].shape)
            if expected != got:
                needed = f"{self.task.name} x {self.num_envs} needs {expected}"
                raise ValueError(f"saved '{name}' has shape {got}, but {needed}")
        for name in KEPT:
            setattr(self, name, state[name].detach().clone())
        self.generator.set_state(state["generator"])

    def _start_states(self, n: int) -> tuple[Tensor, Tensor]:
        generator = self.generator if self.stochastic_reset else None
        return self.task.start_state(self._start_q, self.model.nqd, n, generator)

    def _draw_starts(self) -> None:
        """The next STARTS start states of each environment, and that none has been used."""
        q, qd = self._start_states(self.num_envs * STARTS)
        self.starts_q, self.starts_qd = q.view(self.num_envs, STARTS, -1), qd.view(self.num_envs, STARTS, -1)
        self.episode = torch.zeros(self.num_envs, dtype=torch.long)

    def _place(self, q: Tensor, qd: Tensor) -> None:
        self.q, self.qd = q, qd
        self.progress = torch.zeros(self.num_envs, dtype=torch.long)
        self.action = torch.zeros(self.num_envs, self.action_dim)
        self.obs = self._observe(recording=False)

    # -- stepping ------------------------------------------------------------------------------------------------------

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One control step; see the class. Raises ValueError for a wrong shape or non-finite actions."""
        if tuple(action.shape) != (self.num_envs, self.action_dim):
            raise ValueError(f"action must have shape {(self.num_envs, self.action_dim)}, got {tuple(action.shape)}")
        if action.dtype is not torch.float32:
            _check_finite(action)
            action = action.clip(-1.0, 1.0).float()
        recording = torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.qd, action))
        inputs = {"q0": self.q, "qd0": self.qd, "action": action, "obs0": self.obs}
        reads = {
            "progress0": self.progress,
            "episode": self.episode,
            "starts_q": self.starts_q,
            "starts_qd": self.starts_qd,
        }
        show = not recording if self.action_in_obs is None else self.action_in_obs
        new = self.simulator.run(reads, inputs, self._recentre, int(show))
        finished, not_finite = self.simulator.status()
        if not_finite:
            _check_finite(action)
        self.q, self.qd, self.obs = new["q1"], new["qd1"], new["obs1"]
        self.action, self.progress = new["action1"], new["progress1"]
        terminated, truncated, final_obs = new["terminated"], new["truncated"], new["obs1"]
        if finished:
            final_obs = new["final_obs"]
            self.episode = self.episode + (terminated | truncated)
            if int(self.episode.max()) == STARTS:
                self._draw_starts()
        return self.obs, new["reward"], terminated, truncated, {"final_obs": final_obs, "final_q": new["final_q"]}

    def restart_rows(self, rows: Tensor, q: Tensor, qd: Tensor) -> None:
        """Put the environments ``rows`` [n] at q [n, nq], qd [n, nqd], at the start of an episode; cuts their graph."""
        self.q = self.q.index_copy(0, rows, q)
        self.qd = self.qd.index_copy(0, rows, qd)
        self.action = self.action.index_fill(0, rows, 0.0)
        self.progress = self.progress.index_fill(0, rows, 0)
        fresh = self.task.observe(q, qd, torch.zeros(len(rows), self.action_dim))
        self.obs = self.obs.index_copy(0, rows, fresh)

    def _observe(self, recording: bool) -> Tensor:
        shown = self.action_in_obs if self.action_in_obs is not None else not recording
        return self.task.observe(self.q, self.qd, self.action if shown else torch.zeros_like(self.action))


def _check_finite(action: Tensor) -> None:
    bad = (~torch.isfinite(action).all(-1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"action must be finite; it is not in environments {bad[:8]}")
