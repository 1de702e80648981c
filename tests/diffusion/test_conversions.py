import math

import pytest
import torch
from cases import INTERPOLANTS, LATENT
from oracles import PairVelocity, random_mixture

import pyro_interpolant as pi
from pyro_interpolant.diffusion import convert


class Slow(pi.Interpolant):
    """A path whose data enter with no slope: the score at t = 0 is a limit."""

    def coefficients(self, t):
        return 1 - t, t**2, torch.zeros_like(t)


MEMBERS = {
    **INTERPOLANTS,
    **LATENT,
    "variance-preserving": pi.VariancePreserving(lambda t: t**2 * (3 - 2 * t)),
    "slow": Slow(),
    "mirror": pi.Mirror(pi.SineSquared(0.7)),
}
TIMES = (0.05, 0.3, 0.5, 0.62, 0.8, 0.97)


def oracle(interpolant, dim=3):
    return PairVelocity(torch.zeros(dim), torch.eye(dim), random_mixture(dim, interpolant))


def close(found, expected, tolerance=1e-10):
    error = (found - expected).abs() / (1 + expected.abs())
    return float(error.max()) < tolerance


def states(t, count=40, dim=3):
    return 1.5 * torch.randn(count, dim), torch.full((count,), t)


FORMS = ("velocity", "score", "denoiser", "noise")


@pytest.mark.parametrize("name", MEMBERS)
def test_any_one_gives_all_four(name):
    interpolant = MEMBERS[name]
    truth = oracle(interpolant)
    for t in TIMES:
        if name == "mirror" and t == 0.5:  # its velocity is zero there
            continue
        x, time = states(t)
        a, b, g = (float(c) for c in interpolant.coefficients(torch.tensor(t)))
        d = truth.denoiser(time, x)
        noise = (x - b * d) / math.hypot(a, g)  # the state is sigma n + beta x1
        exact = dict(zip(FORMS, (truth(time, x), truth.score(time, x), d, noise), strict=True))
        if b < 1e-9:  # the state says nothing of the data
            del exact["denoiser"]
        for given, value in exact.items():
            found = convert(interpolant, t, x, **{given: value})
            assert getattr(found, given) is value
            for form, expected in exact.items():
                assert close(getattr(found, form), expected), (t, given, form)


def test_both_ends():
    for name, interpolant in MEMBERS.items():
        if name == "mirror":
            continue
        truth = oracle(interpolant)
        x, time = states(0.0)
        found = convert(interpolant, 0.0, x, velocity=truth(time, x))
        assert close(found.score, -x), name
        if float(interpolant.derivatives(torch.tensor(0.0))[1]) > 0:  # the data enter at once
            mean = truth.log_weights.exp() @ truth.means
            assert close(found.denoiser, mean.expand_as(x)), name
        x, time = states(1.0)
        assert close(convert(interpolant, 1.0, x, velocity=truth(time, x)).denoiser, x), name


@pytest.mark.parametrize("name", ["linear", "encoding-decoding"])
def test_times_of_every_shape(name):
    interpolant = MEMBERS[name]
    truth = oracle(interpolant)
    x = torch.randn(4, 5, 3)
    t = torch.tensor([0.2, 0.55, 0.7, 0.9])[:, None]
    v = truth(t.expand(4, 5), x)
    expected = truth.score(t.expand(4, 5), x)
    for shaped in (t, t.expand(4, 5)):
        s = convert(interpolant, shaped, x, velocity=v).score
        assert close(s, expected)
        assert close(convert(interpolant, shaped, x, score=s).velocity, v)
        noise = convert(interpolant, shaped, x, score=s).noise
        assert close(convert(interpolant, shaped, x, noise=noise).score, s)
    assert close(convert(interpolant, 0.7, x[2], velocity=v[2]).score, expected[2])
    one = convert(interpolant, torch.tensor(0.7), x[2, 0], velocity=v[2, 0]).score
    assert close(one, expected[2, 0])


def test_the_slopes_are_those_that_the_loss_took_where_they_blow_up():
    for interpolant in (LATENT["linear, bridge"], MEMBERS["variance-preserving"]):
        truth = oracle(interpolant)
        for t in (2e-4, 1 - 2e-4):
            x, time = states(t)
            found = convert(interpolant, t, x, velocity=truth(time, x)).score
            assert close(found, truth.score(time, x), 1e-7), (interpolant, t)


def test_denoiser_and_noise_give_what_they_determine_at_the_ends():
    x, d = torch.randn(2, 5, 3)
    found = convert(pi.Linear(), 0.0, x, denoiser=d)
    assert close(found.score, -x)
    assert close(found.velocity, d - x)
    assert torch.equal(convert(pi.Linear(), 1.0, x, noise=d).denoiser, x)


ZEROS = torch.zeros(4, 2, dtype=torch.float64)


def test_refusals():
    with pytest.raises(ValueError, match=r"got t = 1:.*at\(t\)\.score"):
        _ = convert(pi.Linear(), torch.tensor([0.2, 1.0, 1.0, 0.1]), ZEROS, velocity=ZEROS).score
    with pytest.raises(ValueError, match="got t = 0.5:"):
        _ = convert(pi.Mirror(), 0.5, ZEROS, velocity=ZEROS).score
    with pytest.raises(ValueError, match="the denoiser determines the score, got t = 1"):
        _ = convert(pi.Trigonometric(), 1.0, ZEROS, denoiser=ZEROS).score
    with pytest.raises(ValueError, match="there is noise, got t = 1"):
        _ = convert(pi.Linear(), 1.0, ZEROS, noise=ZEROS).velocity
    with pytest.raises(ValueError, match="depends on the data, got t = 0"):
        _ = convert(pi.Linear(), 0.0, ZEROS, score=ZEROS).velocity
    with pytest.raises(ValueError, match="determines the denoiser, got t = 0.3"):
        _ = convert(pi.EncodingDecoding(), 0.3, ZEROS, velocity=ZEROS).denoiser
    with pytest.raises(ValueError, match="expected one of .*, got velocity and noise"):
        convert(pi.Linear(), 0.5, ZEROS, velocity=ZEROS, noise=ZEROS)
    with pytest.raises(ValueError, match=r"times in \[0, 1\], got 1.5"):
        convert(pi.Linear(), 1.5, ZEROS, velocity=ZEROS)
    with pytest.raises(ValueError, match=r"a velocity of as many columns as states of shape"):
        convert(pi.Linear(), 0.5, ZEROS, velocity=ZEROS[:, :1])
    with pytest.raises(ValueError, match="expected a linear interpolant, got NonlinearInterp"):
        convert(pi.NonlinearInterpolant(lambda t, a, b: a), 0.5, ZEROS, velocity=ZEROS)


@pytest.mark.parametrize("t", [0.9, 0.9999, 1.0])
def test_the_denoiser_follows_the_velocity_to_the_end_in_single_precision(t):
    x, velocity = torch.tensor([[0.5], [3.0]], dtype=torch.float32)[:, None]
    found = convert(pi.Linear(), t, x, velocity=velocity).denoiser
    assert float(found) == pytest.approx(0.5 + (1 - t) * 3, rel=1e-6)
    for member in (
        pi.EncodingDecoding(),
        pi.Latent(pi.Linear(), pi.SineSquared(0.8)),
        pi.Trigonometric(),
    ):
        exact = convert(member, t, x.double(), velocity=velocity.double()).denoiser
        found = convert(member, t, x, velocity=velocity).denoiser
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("t", [0.9, 0.99, 0.995, 0.9995])
def test_a_score_in_single_precision_is_right_or_refused(t):
    """Of data N(0.7, 4) on the encoding-decoding path, whose velocity is known."""
    at, x = torch.tensor(t, dtype=torch.float64), torch.tensor([[-1.0], [0.5], [2.0]]).double()
    path = pi.EncodingDecoding()
    (a, b, g), (da, db, dg) = path.coefficients(at), path.derivatives(at)
    variance = a**2 + g**2 + 4 * b**2
    score = -(x - 0.7 * b) / variance
    velocity = db * (0.7 + 4 * b / variance * (x - 0.7 * b)) - (a * da + g * dg) * score
    if t > 0.99:
        with pytest.raises(ValueError, match="the velocity determines the score"):
            _ = convert(path, t, x.float(), velocity=velocity.float()).score
    else:
        found = convert(path, t, x.float(), velocity=velocity.float()).score
        torch.testing.assert_close(found.double(), score, rtol=0, atol=0.01)


@pytest.mark.parametrize("path", [pi.Linear(), pi.EncodingDecoding()])
def test_the_denoiser_in_single_precision_gives_what_it_determines(path):
    truth = random_mixture(3, path)
    scores = 0
    for left in (0.03, 0.01, 0.004, 5e-4):
        t = torch.tensor(1 - left, dtype=torch.float32).double()
        x = truth.sample(t, 50).float().double()
        exact = convert(path, t, x, velocity=truth(t, x))
        found = convert(path, t.float(), x.float(), denoiser=exact.denoiser.float())
        # In units of their own: draws of the noise are of size 1.
        assert close(found.noise.double(), exact.noise, 0.2)
        assert close(found.velocity.double(), exact.velocity, 0.01)
        try:
            error = found.score.double() - exact.score
        except ValueError:  # refused
            continue
        scores += 1
        assert float(error.norm() / exact.score.norm()) < 0.1
    assert 0 < scores < 4
