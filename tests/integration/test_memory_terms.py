"""Bytes of optimizers and of quantised weights against those of the real packages."""

import pytest

from autotune.memory import optimizers, quantised
from autotune.memory.setup import Optimizer, Quantised
from tests.integration.allocator import allocator_peak

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.integration

SHAPES = [(512, 1024), (1024, 512), (512, 512)]
ELEMENTS = sum(rows * columns for rows, columns in SHAPES)
LARGEST = 512 * 1024
# Scalars, one step counter a parameter, and the code book of 256 values.
SLACK = 16 * 1024


def of_torch(optimizer, params):
    match optimizer:
        case Optimizer.ADAMW:
            return torch.optim.AdamW(params, foreach=False)
        case Optimizer.ADAFACTOR:
            return torch.optim.Adafactor(params, foreach=False)
        case Optimizer.MUON:
            return torch.optim.Muon(params)
        case Optimizer.SGD:
            return torch.optim.SGD(params)
        case Optimizer.SGD_MOMENTUM:
            return torch.optim.SGD(params, momentum=0.9)


def parameters(dtype):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def storage(tensors):
    """Bytes of the storages, each once."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(kept.values())


def state_of(optimizer):
    return storage(
        v
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind",
    [
        Optimizer.ADAMW, Optimizer.ADAFACTOR, Optimizer.SGD, Optimizer.SGD_MOMENTUM,
        pytest.param(Optimizer.MUON, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_states_and_step_of_torch(kind, dtype):
    params = parameters(dtype)
    optimizer = of_torch(kind, params)
    optimizer.step()
    width = dtype.itemsize
    kept = sum(
        rows * columns * optimizers.state_bytes_per_element(kind, width, (rows, columns))
        for rows, columns in SHAPES
    )
    assert state_of(optimizer) == pytest.approx(kept, abs=SLACK)
    needed = optimizers.step_bytes(
        kind, ELEMENTS, LARGEST, element_bytes=width, before=LARGEST, largest_shape=(512, 1024)
    )
    # Reductions and matrix products in bf16 take a little scratch on a CPU; oneDNN's would pack a
    # whole operand where the CPU has matrix units, which is the CPU's and not the optimizer's.
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        peak = allocator_peak(optimizer.step)
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])
    assert peak == pytest.approx(needed, rel=0.08, abs=SLACK)


def test_foreach_adamw_needs_one_copy_of_all():
    optimizer = torch.optim.AdamW(parameters(torch.float32), foreach=True)
    optimizer.step()
    needed = optimizers.step_bytes(Optimizer.ADAMW, ELEMENTS, LARGEST, foreach=True)
    assert allocator_peak(optimizer.step) == pytest.approx(needed, rel=0.02, abs=SLACK)


@pytest.mark.parametrize("kind", [Optimizer.ADAMW_8BIT, Optimizer.LION])
def test_states_of_bitsandbytes(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = parameters(torch.bfloat16)
    classes = {Optimizer.ADAMW_8BIT: "AdamW8bit", Optimizer.LION: "Lion"}
    optimizer = getattr(bitsandbytes.optim, classes[kind])(params)
    for group, param in enumerate(params):
        optimizer.init_state(optimizer.param_groups[0], param, 0, group)
    kept = ELEMENTS * optimizers.state_bytes_per_element(kind, 2)
    assert state_of(optimizer) == pytest.approx(kept, abs=SLACK)


@pytest.mark.parametrize(
    ("kind", "nested"), [(Quantised.NF4, False), (Quantised.NF4_DOUBLE, True)], ids=str
)
def test_quantised_weight_of_bitsandbytes(kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 2048)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    tensors = [packed, state.absmax, *([state.state2.absmax] if nested else [])]
    kept = weight.numel() * quantised.bytes_per_element(kind, (2048, 1024))
    assert storage(tensors) == pytest.approx(kept, rel=1e-3)
    copy = functional.dequantize_4bit(packed, state)
    assert copy.nbytes == quantised.working_bytes(kind, weight.numel(), 4)
