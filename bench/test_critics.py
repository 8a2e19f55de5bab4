"""All of a gradient step's critic updates (`csrc/critic_epoch.cpp`) against torch's, and against what the core can do.

    pytest bench/test_critics.py -s

8 epochs of 4 minibatches of 256 rows, three critics: forward, backward, clipping, Adam. The bound is the products'
multiply-adds at the speed that one core reaches in registers, in turn with the updates; all else counts as lost. Times
are CPU seconds, the fastest of several; both start from the same critics and must agree in float32 before a speed
counts.

With AVX2 (Zen 3, other work on the machine) 61 to 68% of that peak at 1M, 64 to 73% at 5M, 67 to 74% at 48M. Of the
time at 5M the products take 82%, LayerNorm with Mish 7%, copies of factors 6%, Adam 4%. A C++ loop over the same
products and nothing else reaches 87 to 88%, forward and weight gradient of the first layer 92 to 94%: with AVX2 80%
would leave a tenth of the products' time for all else. Asking for A's tiles ahead changed nothing there.

With AMX (Intel) 67 to 69%, 75 to 78%, 79 to 80%, with AVX-512 there 50 to 58%, both measured before Adam's step waited
for the next minibatch: of the time with AMX at 5M, the tiles' products took 57%, making tiles 13%, LayerNorm with Mish
12%, Adam 10% and the norm 3%, both at the speed of the third-level cache: parameters, gradients and moments of three
critics are 14 MB. What the waiting, the arrays' places and a shorter Mish gave with AVX2 together: 4% of an update at
each size (the fastest of four runs, in turn with the version before; at 5M their medians were alike). Quotients and
roots without the divider changed nothing (AMX), or took 1.4 times as long (AVX2).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_extraction import cpu_seconds, make_world_model, roofline

from pwm_fast import backend
from pwm_fast.learning.extraction import PRESETS, CriticRows, Extraction

pytestmark = [
    pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}"),
    pytest.mark.timeout(0),
]


@pytest.mark.parametrize("preset", ["published-code", "paper"])  # rows in fixed blocks, or shuffled in each epoch
@pytest.mark.parametrize("size", ["1M", "5M", "48M"])
def test_critic_updates(size: str, preset: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable) -> None:
    model, config = make_world_model(size), PRESETS[preset]
    native, eager = (Extraction(model, config, task_ids=[3]) for _ in range(2))
    torch.manual_seed(0)
    count, widths = config.horizon * config.batch_size, native.critic.mlp.widths
    rows = CriticRows(torch.randn(1, count, widths[0]).softmax(-1), torch.randn(1, count))

    def on_torch() -> None:
        with monkeypatch.context() as patch:
            patch.setenv(backend.VARIABLE, "torch")
            eager.learn_critics(rows)

    native.learn_critics(rows)
    on_torch()
    difference = (native.critic.parameters.flat - eager.critic.parameters.flat).abs().max().item()
    assert difference < 2e-4  # 32 steps of 5e-4: Adam turns roundings of gradients near zero into whole steps

    products = sum(a * b for a, b in pairwise(widths))
    flop = 2.0 * config.num_critics * count * config.critic_epochs * (3 * products - widths[0] * widths[1])
    calls = [lambda: cpu_seconds(lambda: native.learn_critics(rows), 3), lambda: cpu_seconds(on_torch, 3), roofline]
    rounds = [[call() for call in calls] for _ in range(4)]
    ours, theirs, peak = min(r[0] for r in rounds), min(r[1] for r in rounds), max(r[2] for r in rounds)
    share = flop / ours / peak
    print(
        f"\n  critics at {size}, {preset}: native {1e3 * ours:.1f} ms, {flop / ours / 1e9:.1f} of {peak / 1e9:.1f} "
        f"GFLOP/s ({share:.0%}); torch {1e3 * theirs:.1f} ms, ratio {theirs / ours:.2f}; differ by {difference:.1e}",
        end="",
    )
    record_property(f"critics_{size}_{preset}_share_of_peak", share)
    record_property(f"critics_{size}_{preset}_ratio", theirs / ours)
