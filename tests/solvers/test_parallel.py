"""Blocks of rows side by side: the same values, on one thread each, the caller's number kept."""

import threading

import pytest
import torch
from pyro.distributions import Normal, TransformedDistribution
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantTransform,
    ExactDivergence,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantTransform,
    VelocityMLP,
)
from pyro_interpolant.nn.velocity import keeps_nothing
from pyro_interpolant.solvers import parallel
from pyro_interpolant.solvers.parallel import one_thread_each, side_by_side, threads_at_once
from pyro_interpolant.transforms import flow as flow_module

ALL, ROWS, DIM = 3, 1100, 2


@pytest.fixture(autouse=True)
def _all_threads():
    """The machine has three; the fixture of all tests takes that back."""
    torch.set_num_threads(ALL)


def trained(network, **options):
    """A transform whose field is not zero, as a distribution has it."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    conditional = getattr(network, "context_dim", 0)
    kind = ConditionalInterpolantTransform if conditional else InterpolantTransform
    options = {"solver": FixedGrid(3), "divergence": ExactDivergence()} | options
    return kind(network, **options).eval().requires_grad_(requires_grad=False)


def density(transform):
    return TransformedDistribution(Normal(torch.zeros(DIM), 1.0).to_event(1), [transform])


@pytest.fixture
def threads(monkeypatch):
    """The numbers of threads of torch's with which solves are evaluated, by thread of Python."""
    seen = {}
    plain = VelocityMLP.field

    def field(network, times, context):
        numbers = seen.setdefault(threading.current_thread(), set())
        numbers.add(torch.get_num_threads())
        return plain(network, times, context)

    monkeypatch.setattr(VelocityMLP, "field", field)
    return seen


@pytest.mark.parametrize(
    ("dtype", "rows", "keep"),
    [(torch.float32, 513, True), (torch.float64, ROWS, False), (torch.float64, 2100, True)],
)
def test_values_are_those_of_one_thread(dtype, rows, keep, threads, monkeypatch):
    if not keep:
        monkeypatch.setattr(flow_module, "_MAX_KEPT_BYTES", 4096 * DIM)
    flow = density(trained(VelocityMLP(DIM, (16,)).to(dtype)))
    x = torch.randn(rows, DIM, dtype=dtype)
    many = flow.log_prob(x), flow.transforms[0](x)
    assert main_thread() not in threads
    assert set().union(*threads.values()) == {1}
    assert torch.get_num_threads() == ALL
    torch.set_num_threads(1)
    one = flow.log_prob(x.clone()), flow.transforms[0](x.clone())
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b)


def main_thread():
    return threading.main_thread()


def test_contexts_stay_with_their_rows(threads):
    transform = trained(VelocityMLP(DIM, (16,), context_dim=1))
    for layout in [(), (7, 1), (1, 200), (7, 200)]:
        torch.set_num_threads(ALL)
        x, context = torch.randn(7, 200, DIM), torch.randn(*layout, 1)
        many = transform.condition(context)(x)
        assert main_thread() not in threads
        torch.set_num_threads(1)
        torch.testing.assert_close(many, transform.condition(context)(x.clone()))
        threads.clear()


def test_modes_of_autograd_hold_in_all_threads():
    flow = density(trained(VelocityMLP(DIM, (16,))))
    with torch.inference_mode():
        assert flow.log_prob(torch.randn(ROWS, DIM)).is_inference()
    found = side_by_side(lambda i: torch.is_grad_enabled(), [(0,), (1,)], threads=2)
    assert found == [False, False]


def test_autocast_which_is_of_one_thread_is_heeded():
    transform = trained(VelocityMLP(DIM, (16,)).float())
    flow = TransformedDistribution(Normal(torch.zeros(DIM).float(), 1.0).to_event(1), [transform])
    x = torch.randn(ROWS, DIM).float()
    plain = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        many = flow.log_prob(x)
        few = torch.cat([flow.log_prob(part) for part in x.split(256)])
    assert (few - plain).abs().mean() > 4 * (many - few).abs().mean()


class Own(nn.Module):
    """A network of one's own, which may keep what it computes."""

    event_dim = DIM

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, t, x, context=None):
        """Return the velocity, noting where it was asked for."""
        self.seen = threading.current_thread()
        return self.layer(x)


def test_what_may_keep_something_between_calls_has_one_thread_of_python():
    own = Own()
    trained(own)(torch.randn(ROWS, DIM))
    assert own.seen is main_thread()
    network = VelocityMLP(DIM, (16,))
    assert not keeps_nothing(network)  # in training
    assert keeps_nothing(network.eval())
    assert not keeps_nothing(nn.Sequential(nn.Dropout(0.5)))
    assert keeps_nothing(nn.Sequential(nn.Dropout(0.5)).eval())
    seen = set()
    network.register_forward_hook(lambda *given: seen.add(threading.current_thread()))
    assert not keeps_nothing(network)
    trained(network)(torch.randn(ROWS, DIM))
    assert seen == {main_thread()}


def test_forward_mode_which_lets_one_thread_in_is_on_one(monkeypatch):
    seen = set()
    plain = HutchinsonDivergence.__call__

    def call(*given):
        seen.add(threading.current_thread())
        return plain(*given)

    monkeypatch.setattr(HutchinsonDivergence, "__call__", call)
    flow = density(trained(VelocityMLP(DIM, (16,)), divergence=HutchinsonDivergence()))
    x = torch.randn(ROWS, DIM)
    many = flow.log_prob(x)
    assert seen == {main_thread()}
    torch.set_num_threads(1)
    torch.testing.assert_close(many, flow.log_prob(x.clone()))


def test_few_rows_and_graphs_are_on_one(threads):
    flow = density(trained(VelocityMLP(DIM, (16,))))
    flow.log_prob(torch.randn(512, DIM))
    x = torch.randn(ROWS, DIM, requires_grad=True)
    flow.log_prob(x).sum().backward()
    assert set(threads) == {main_thread()}
    assert bool(x.grad.any())


def test_in_another_thread_of_python_nothing_is_set(threads):
    transform = trained(VelocityMLP(DIM, (16,)))
    other = threading.Thread(target=transform, args=(torch.randn(ROWS, DIM),))
    other.start()
    other.join()
    assert threads == {other: {ALL}}


def test_an_error_in_a_block_is_the_callers_and_ends_the_rest(monkeypatch):
    """Blocks after the one that fails wait until those not yet begun have been cancelled."""
    calls, cancelled = [], threading.Event()

    class Pool(parallel.ThreadPoolExecutor):
        def __exit__(self, *given):
            cancelled.set()
            return super().__exit__(*given)

    def fails(i):
        calls.append(i)
        if i == 1:
            raise KeyError(i)
        if i > 1:
            cancelled.wait(900)

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyError):
        side_by_side(fails, [(i,) for i in range(100)], threads=2)
    assert len(calls) <= 4
    assert torch.get_num_threads() == ALL


def test_blocks_within_work_on_one_thread_have_all():
    for _ in range(2):
        with one_thread_each(), one_thread_each():
            assert (torch.get_num_threads(), threads_at_once()) == (1, ALL)
        assert (torch.get_num_threads(), threads_at_once()) == (ALL, ALL)
