"""Start states of a population of policies, gathered ahead of the steps that take them."""

from collections.abc import Sequence

from pwm_fast.data.sampling import WindowSampler
from pwm_fast.data.scheduler import Batch, RolloutScheduler


class StartStates:
    """Start observations [P, B, S] float32 of P policies by step number: policy p's are what `samplers[p]` draws.

    The samplers' stores may differ; their rows are padded with zeros, or cut, to S = `obs_dim`. From the first step
    that is asked for, a native worker keeps the next ones ready (`prefetch` as of `RolloutScheduler`), until `close` or
    the end of a `with` block; a later step starts another. There is no state but the step number: any step may come
    after any other. Without the native module, or with `backend="torch"`, each is gathered when it is asked for.

    Raises ValueError for no samplers or numbers out of range.
    """

    def __init__(
        self,
        samplers: Sequence[WindowSampler],
        batch: int,
        obs_dim: int,
        threads: int = 1,
        prefetch: int | None = None,
        backend: str | None = None,
    ) -> None:
        if not samplers:
            raise ValueError("start states need a sampler for each policy, got none")
        for name, value in (("batch", batch), ("obs_dim", obs_dim), ("threads", threads), ("prefetch", prefetch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.samplers, self.batch, self.obs_dim = list(samplers), batch, obs_dim
        self._threads, self._prefetch, self._backend = threads, prefetch, backend
        self._scheduler: RolloutScheduler | None = None
        self._next = 0

    def at(self, step: int) -> Batch:
        """Step number `step`: a batch whose "obs" is [P, B, S], in pinned memory where CUDA is there, to be released.

        Raises StoreError as `WindowSampler.start_states` does, and may be asked again; RingFullError where every batch
        is kept.
        """
        if self._scheduler is None:
            self._scheduler = self._begin(step)
        elif step != self._next:
            self._scheduler.seek(step)
        self._next = step
        batch = next(self._scheduler)
        self._next = step + 1
        return batch

    def _begin(self, step: int) -> RolloutScheduler:
        stores = list({id(sampler.store): sampler.store for sampler in self.samplers}.values())
        scheduler = RolloutScheduler(
            stores, self.batch, None, len(self.samplers), self._prefetch, self._threads, backend=self._backend,
            obs_dim=self.obs_dim,
        )  # fmt: skip
        scheduler.admit_samplers(dict(enumerate(self.samplers)), step)
        return scheduler

    @property
    def waited(self) -> float:
        """Seconds that `at` has waited for data since the workers began."""
        return 0.0 if self._scheduler is None else self._scheduler.waited

    def close(self) -> None:
        """Ends the workers. What is in use stays readable; a later step starts new ones."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close()

    def __enter__(self) -> "StartStates":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
