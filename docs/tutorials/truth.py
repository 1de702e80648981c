"""What the tutorials share: a comparison with a known truth, and small sizes for a quick build.

With DOCS_SMALL=1 training and sampling are cut short, whatever a page asks for: all runs, and
comparisons are shown, but nothing is demanded of them.
"""

import functools
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.infer
import torch

import pyro_interpolant as pi

SMALL = os.environ.get("DOCS_SMALL", "") not in ("", "0")


def check(**rows):
    """Print found values beside true ones, and raise if one is farther away than it may be.

    Args:
        rows: For each name the value found, the truth, and the distance allowed.
    """
    print(f"{'':28s}{'found':>10s}{'truth':>10s}{'allowed':>10s}")
    far = []
    for name, (found, truth, allowed) in rows.items():
        print(f"{name.replace('_', ' '):28s}{found:10.3f}{truth:10.3f}{allowed:10.3f}")
        if not abs(found - truth) <= allowed:
            far.append(name)
    if far and not SMALL:
        raise AssertionError(f"farther from the truth than allowed: {far}")


def _at_most(function, **limits):
    """Return a function whose numbers are at most these."""

    @functools.wraps(function)
    def cut(*args, **options):
        for name, most in limits.items():
            options[name] = min(options.get(name, most), most)
        return function(*args, **options)

    return cut


def _short(fit_guide):
    """Return the training of a guide with few steps, rounds and simulations."""

    @functools.wraps(fit_guide)
    def cut(guide, *args, **given):
        options = {"steps": 20}
        if isinstance(guide, pi.AmortizedInterpolant):
            given["simulations"] = min(given.get("simulations", 500), 500)
        elif "samples" not in given:
            given["rounds"], options["draws"] = 2, 300
        return fit_guide(guide, *args, **given, options=options)

    return cut


pyro.set_rng_seed(0)
torch.set_num_threads(1)  # as fast as two for networks of this size
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 9})
if SMALL:
    warnings.simplefilter("ignore")  # what is too short is also poor, and says so
    from narrow import small_runs

    small_runs()
    pi.from_samples = _at_most(pi.from_samples, steps=20)
    pi.from_noisy_samples = _at_most(pi.from_noisy_samples, steps=20)
    pi.fit_guide = _short(pi.fit_guide)
    pi.infer.object_posteriors = _at_most(pi.infer.object_posteriors, draws=100)
    pi.diagnostics.bits_per_dim = functools.partial(pi.diagnostics.bits_per_dim, tolerance=1.0)
    pyro.infer.MCMC = _at_most(pyro.infer.MCMC, num_samples=20, warmup_steps=20)
