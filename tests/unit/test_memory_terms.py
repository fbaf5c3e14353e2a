"""Bytes of optimizers and of a quantised base, by hand."""

import pytest

from autotune.memory import optimizers, quantised
from autotune.memory.setup import Optimizer, Quantised

BILLION = 10**9


@pytest.mark.parametrize(
    ("optimizer", "element_bytes", "expected"),
    [
        (Optimizer.ADAMW, 4, 8),
        (Optimizer.ADAMW, 2, 4),
        (Optimizer.ADAMW_8BIT, 4, 2 + 8 / 256),
        (Optimizer.PAGED_ADAMW_8BIT, 4, 8 / 256),
        (Optimizer.LION, 2, 4),
        (Optimizer.MUON, 2, 2),
        (Optimizer.SGD, 4, 0),
        (Optimizer.SGD_MOMENTUM, 4, 4),
    ],
)
def test_state_of_each_optimizer(optimizer, element_bytes, expected):
    assert optimizers.state_bytes_per_element(optimizer, element_bytes) == expected


def test_adafactor_keeps_a_row_and_a_column():
    per_element = optimizers.state_bytes_per_element(Optimizer.ADAFACTOR, 4, (300, 200))
    assert per_element * 300 * 200 == pytest.approx(4 * 500)
    with pytest.raises(ValueError, match="shape"):
        optimizers.state_bytes_per_element(Optimizer.ADAFACTOR)


def test_paged_states_are_managed_memory():
    assert optimizers.managed_bytes_per_element(Optimizer.PAGED_ADAMW_8BIT) == 2
    assert optimizers.managed_bytes_per_element(Optimizer.ADAMW_8BIT) == 0


def test_temporaries_of_a_step():
    def step(optimizer, **how):
        return optimizers.step_bytes(optimizer, BILLION, 10**8, **how)

    assert step(Optimizer.ADAMW, fused=True, foreach=True) == 0
    assert step(Optimizer.ADAMW, foreach=True) == 4 * BILLION
    assert step(Optimizer.ADAMW, foreach=True, element_bytes=2) == 2 * BILLION
    assert step(Optimizer.ADAMW) == 8 * 10**8
    assert step(Optimizer.ADAMW, before=10**6) == 8 * 10**8 + 4 * 10**6
    assert step(Optimizer.ADAFACTOR, before=10**6) == 4 * 10**8 + 4 * 10**6
    assert step(Optimizer.SGD) == step(Optimizer.ADAMW_8BIT) == 0
    # Nesterov's fp32 update and two bf16 iterates; two bf16 Gram matrices of the smaller side.
    assert step(Optimizer.MUON, largest_shape=(1000, 10**5)) == 8 * 10**8 + 4 * 10**6


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (Quantised.NF4, 4.5),
        (Quantised.NF4_DOUBLE, 4.127),  # "QLoRA", section 3: 0.127 bits a parameter
        (Quantised.INT8, 8 + 32 / 4096),
        (Quantised.GPTQ, 4 + 20 / 128 + 32 / 14336),
    ],
)
def test_bits_of_a_quantised_weight(kind, bits):
    stored = quantised.bytes_per_element(kind, (4096, 14336))
    assert 8 * stored == pytest.approx(bits, abs=2e-4)


def test_sum_and_working_copy():
    shapes = {"q_proj": (64, 64), "up_proj": (64, 256)}
    assert quantised.stored_bytes(Quantised.NF4, shapes) == 64 * 320 * 0.5625
    assert quantised.working_bytes(Quantised.NF4, 64 * 256, 2) == 2 * 64 * 256
    assert quantised.working_bytes(Quantised.INT8, 64 * 256, 2) == 64 * 256
