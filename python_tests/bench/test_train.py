"""The accounting of training memory: against the allocator, fake against real, and the bar at SDXL's size."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from idcore.backends import cpu
from idcore.bench import fakes, train
from idcore.bench.live_memory import LiveMemory, allocator_peak
from idcore.bench.train_check import CHECKED, SmallStep, validation
from idcore.ops import id_attention


def test_counts_storages_once_and_as_long_as_they_live():
    given = torch.zeros(1000)
    with LiveMemory() as memory:
        a = given + 1
        view = a[10:]
        assert memory.now == 4000
        del a
        assert memory.now == 4000
        del view
        assert memory.now == 0
        given.add_(1)
        assert (memory.now, memory.peak) == (0, 4000)
        w = torch.ones(1000, requires_grad=True)
        y = (w * 2).exp().sin()
        assert memory.now == 3 * 4000  # w, what exp and sin both keep, and the result
        y.sum().backward()
        del y
        assert memory.now == 2 * 4000  # w and its gradient


def test_fake_tensors_count_as_real_ones():
    def work(x, w):
        return torch.nn.functional.silu(torch.nn.functional.conv2d(x, w, padding=1)).square().mean()

    def peak(memory):
        x, w = torch.ones(2, 8, 32, 32), torch.ones(8, 8, 3, 3, requires_grad=True)
        with memory:
            work(x, w).backward()
        return memory.peak

    real = peak(LiveMemory())
    with FakeTensorMode():
        assert peak(LiveMemory()) == real > 4 * 8 * 32 * 32 * 2


def test_accounting_equals_the_allocator():
    """The allocator also sees what operations allocate inside of themselves. The default way stays below the bar."""
    (row,) = validation(48, ("steps and decode recomputed",))
    assert 0.85 < row["counted_of_allocator"] < 1.1, row
    step, kept = SmallStep(48, CHECKED["kept"]), LiveMemory()
    with kept:
        step()
    assert row["allocator_mb"] * 1e6 <= train.BAR * kept.peak
    assert allocator_peak(lambda: torch.ones(1 << 20).add(1)) == pytest.approx(8 << 20, rel=0.01)


def test_ids_without_numbers_reach_no_kernel():
    with FakeTensorMode():
        q, k = torch.empty(1, 2, 64, 32), torch.empty(1, 2, 7, 32)
        assert id_attention(q, k, k, k, k).shape == q.shape


@pytest.mark.nightly
def test_the_bar_at_full_size():
    """SDXL at 768 px, the whole objective: four steps with gradients, the default way, in at most 40 % of what the
    eager processors keep for a single one."""
    ways = {w.name: w for w in train.WAYS}
    with fakes.without_numbers():
        rig = train.Rig(train._scheduler(), 768, "add")
        eager = rig.row(ways["eager"], "2", 1)
        ours = rig.row(ways["ours, steps and decode recomputed"], "3", 4)
    assert eager["kept_gb"] > 9
    assert ours["peak_gb"] <= train.BAR * eager["kept_gb"]


def test_the_counter_knows_our_ops():
    """Attention of one layer by its formula, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=train._formulas()) as counter:
        q, k, v = torch.empty(1, 2, 64, 32, requires_grad=True), torch.empty(1, 2, 7, 32), torch.empty(1, 2, 7, 32)
        me = torch.empty(1, 2, 5, 32, requires_grad=True)
        out = id_attention(q, k, v, me, me, backend="cpu" if cpu._load()[0] else None)
        if cpu._load()[0] is None:
            pytest.skip(cpu._load()[1])
        assert counter.get_total_flops() == 4 * 2 * 64 * 32 * 12
        out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 64 * 32 * (2 * 12 + 3 * 7 + 5 * 5)
