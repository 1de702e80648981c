"""What the package keeps between itself and torch."""

import threading
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pyro_interpolant import _torch
from pyro_interpolant._torch import (
    draws,
    draws_nothing,
    jvp,
    rng_state,
    seeded,
    set_rng_state,
    slopes,
    watching_the_first,
)


def test_a_warning_names_the_line_outside_the_package():
    for source in (
        "def g(): warn_user('careful')\ndef f(): return g()",
        "@torch.no_grad()\ndef g(): warn_user('careful')\ndef f():\n  for _ in [0]: g()",
        "import contextlib\n@contextlib.contextmanager\ndef g():\n"
        "  warn_user('careful'); yield\ndef f():\n  with g(): pass",
    ):
        names = {"warn_user": _torch.warn_user, "torch": torch}
        inside = _torch.__file__.replace("_torch.py", "room/module.py")
        exec(compile(source, inside, "exec"), names)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names["f"]()
        found = [(w.filename, str(w.message), w.category) for w in caught]
        assert found == [(__file__, "careful", UserWarning)]


def everything_that_draws():
    """Draws of torch, of its layers and their initialisation, of Pyro and of a loader."""
    linear, layer = nn.Linear(3, 4), nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
    found = [
        torch.randn(5),
        torch.randint(10, (4,)),
        torch.randperm(7),
        torch.randn_like(torch.zeros(4, 5).T),
        torch.empty(3).normal_(),
        torch.empty((), dtype=torch.int64).random_(),
        torch.multinomial(torch.ones(10), 4),
        nn.functional.dropout(torch.ones(50), 0.3),
        nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 4), dropout_p=0.5),
        nn.LSTM(3, 4, num_layers=2, dropout=0.5)(torch.ones(2, 5, 3))[0],
        layer(torch.ones(2, 5, 8)),
        *linear.parameters(),
        torch.func.vmap(lambda _: torch.randn(3), randomness="different")(torch.zeros(4)),
        *DataLoader(torch.arange(20), batch_size=4, shuffle=True),
    ]
    for base in (
        dist.Normal(0.0, 1.0),
        dist.Gamma(2.0, 1.0),
        dist.Binomial(10, torch.tensor(0.3)),
        dist.Poisson(torch.tensor(3.0)),
        dist.VonMises(0.0, 1.0),
    ):
        found.append(base.sample((20,)))
    return [part.detach() for part in found]


def test_a_seeded_scope_draws_what_the_global_generator_would_and_leaves_it_alone():
    torch.manual_seed(3)
    expected = everything_that_draws()
    with torch.random.fork_rng():
        torch.manual_seed(17)
        state = torch.get_rng_state()
        with seeded(3):
            found = everything_that_draws()
        assert torch.equal(torch.get_rng_state(), state)
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.parametrize("seed", [3, None])
def test_a_state_is_that_of_the_cpu_and_of_a_gpu(seed, monkeypatch):
    cpu, gpu, own = torch.device("cpu"), torch.device("cuda", 0), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (own,))  # it stands for that of a GPU

    def drawn():
        return torch.cat((torch.randn(4), torch.randn(4, generator=own)))

    with seeded(seed):
        if seed is not None:
            _torch._SCOPE.generators.generators[gpu] = own
        both, one = rng_state(gpu), rng_state(cpu)
        first = drawn()
        assert not torch.equal(drawn(), first)
        set_rng_state(both, gpu)
        assert torch.equal(drawn(), first)
        for state, device in ((one, gpu), (both, cpu)):  # of or on a machine without one
            set_rng_state(state, device)
            third = drawn()
            assert torch.equal(third[:4], first[:4])
            assert not torch.equal(third[4:], first[4:])


def test_scopes_nest_and_a_block_that_draws_nothing_interrupts_them():
    with seeded(1):
        first, second = torch.randn(3), torch.randn(3)
    with seeded(np.int64(1)):
        a = torch.randn(3)
        with seeded(2):
            torch.randn(3)
            with draws_nothing(), draws_nothing():
                torch.ones(3).sum()
        with draws_nothing():
            assert draws() == 1
        with seeded(None):
            b = torch.randn(3)
        assert draws() == 2
    assert torch.equal(a, first)
    assert torch.equal(b, second)
    with seeded(1), watching_the_first() as watched:  # which draws, so that all are looked at
        drawing = watched(lambda: torch.randn(3))
        assert torch.equal(drawing(), first)
        assert torch.equal(drawing(), second)
    with pytest.raises(ValueError, match="expected a seed that is whole"), seeded(0.5):
        pass


class Simulated(IterableDataset):
    def __iter__(self):
        for _ in range(2):
            yield torch.randn(3)


def test_workers_of_a_loader_draw_numbers_of_their_own():
    loader = DataLoader(Simulated(), batch_size=None, num_workers=2)
    with seeded(0):
        rows = [*loader, *torch.randn(2, 3)]
    assert len(torch.stack(rows).unique(dim=0)) == 6
    with seeded(0):
        assert torch.equal(torch.stack(rows[:4]), torch.stack(list(loader)))


def test_what_takes_no_generator_draws_in_a_scope_inside_another_from_the_inner_one():
    """Attention is of this kind; the outer scope waited for ever for what the inner one held."""
    x = torch.ones(20)
    with seeded(1):
        alone = torch.native_dropout(x, 0.5, True)[0]  # noqa: FBT003
    with seeded(0), seeded(1):
        assert torch.equal(torch.native_dropout(x, 0.5, True)[0], alone)  # noqa: FBT003
        assert draws() == 1


@pytest.mark.parametrize("other", [slopes, jvp])
def test_two_threads_differentiate_forward_at_a_time(other):
    """The second waits for the first, which would else end in an error of nested levels."""
    errors, t = [], torch.tensor(0.3)

    def second():
        try:
            if other is slopes:
                slopes(lambda t: (t, t, t), t)
            else:
                jvp(torch.sin, (t,), (torch.tensor(1.0),))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=second)

    def first(t):
        thread.start()
        thread.join(0.1)  # it goes on from here alone where nothing holds it
        return t, t**2, t**3

    found = slopes(first, torch.tensor(0.5))
    thread.join()
    assert not errors
    assert [float(s) for s in found] == pytest.approx([1.0, 1.0, 0.75])
