"""Small runs: narrow networks and few rows and draws, where what comes of them is not looked at.

All that runs otherwise runs in them too.
"""

import functools
import importlib
import pkgutil

import pyro_interpolant
from pyro_interpolant import Adaptive, FixedGrid

# What a run does around its training, which is most of it where that takes a few steps.
FEW = {
    "training.objective._HELD_DRAWS": 256,
    "training.agreement._MOST_ROWS": 100,
    "training.agreement._DRAWS": (100, 200),
    "training.agreement._SHUFFLES": 5,
    "training.reporting._REPORTED_ROWS": 100,
    "training.reporting._JUDGED_ROWS": 50,
    "training.reporting._JUDGING_SOLVER": FixedGrid(steps=4),
    "training.fitting._CALIBRATION_ROWS": 32,
    "diagnostics.calibration._REFERENCE": Adaptive(rtol=1e-4, atol=1e-4, nodes=32),
    "diagnostics.likelihood._TRIED_IMAGES": 2,
    "diagnostics.predictive._SHARED_DRAWS": 400,
    "diagnostics.two_sample._STEPS": 20,
    "transport.rectified._COMPARED_ROWS": 32,
    "transport.rectified._FINE_STEPS": 16,
    "infer.importance_sampling._VERDICT_DRAWS": 500,
    "infer.smc.train._VERDICT_DRAWS": 500,
    "infer.smc.train._CALIBRATION_ROWS": 32,
    "infer.smc.train._MIXING_MOVES": 8,
    "infer.smc.train._MOST_ROUND_MOVES": 8,
    "infer.smc.pathfinder._SEARCHES": 16,
    "infer.smc.pathfinder._SCOUTS": 128,
    "infer.amortization._JUDGED_SETS": 2,
    "infer.amortization._JUDGED_DRAWS": 200,
    "infer.amortized.JUDGED_ROWS": 100,
    "infer.deconvolution._ITERATIONS": 5,
    "infer.deconvolution._LAST_ITERATIONS": 3,
    "infer.deconvolution._MOST_COMPONENTS": 4,
    "infer.latents._STARTS": 128,
    "infer.population._START_DRAWS": 1000,
    "infer.expectation_maximization._CALIBRATION_ROWS": 32,
    "infer.expectation_maximization.NoisyRows.look_rows": 50,
    "infer.expectation_maximization.PosteriorDraws.look_rows": 50,
    "infer.expectation_maximization._LOOK_CANDIDATES": 64,
    "infer.expectation_maximization.NoisyRows.round_rows": 256,
    "infer.expectation_maximization.PosteriorDraws.round_rows": 256,
    "infer.expectation_maximization._LOOK_DRAWS": {"shared": 256, "own": 4, "steps": 1},
    "infer.expectation_maximization._REPORT_DRAWS": {"shared": 256, "own": 8, "steps": 1},
}

BRIEF = {
    "training.objective._HELD_DRAWS": 1024,
    "training.reporting._JUDGING_SOLVER": FixedGrid(steps=8),
}


def narrow(plain):
    """As deep as by default, so that the same code runs; of VelocityMLP's constructor."""

    @functools.wraps(plain)
    def init(self, event_dim, hidden_dims=None, *sizes, **more):
        if hidden_dims is None:
            hidden_dims = (16, 16, 16) if event_dim <= 32 else (16, 16)
        plain(self, event_dim, hidden_dims, *sizes, **more)

    return init


def narrow_networks(put=setattr):
    """Make networks narrow, but not those whose widths are given."""
    cls = pyro_interpolant.VelocityMLP
    put(cls, "__init__", narrow(cls.__init__))


def shallow(plain):
    """Return what gives the U-Net, of one block for each level in place of two."""
    return lambda: functools.partial(plain(), layers_per_block=1)


def small_runs(put=setattr):
    """Make all that runs small; a test gives the function that undoes it at its end."""
    narrow_networks(put)
    unets = importlib.import_module("pyro_interpolant.nn.unet")
    put(unets, "_diffusers_unet", shallow(unets._diffusers_unet))
    rounds = importlib.import_module("pyro_interpolant.infer.smc.train").train_from_density
    few = {**rounds.__wrapped__.__kwdefaults__, "draws": 400, "rounds": 2}
    put(rounds.__wrapped__, "__kwdefaults__", few)
    _put_constants(put, FEW)


def brief_looks(put=setattr):
    """Make looks at rows held out brief, but good enough that the better weights are kept."""
    _put_constants(put, BRIEF)


def _put_constants(put, values):
    for name, value in values.items():
        place, _, constant = name.rpartition(".")
        place = pkgutil.resolve_name(f"pyro_interpolant.{place}")  # a module, or a class in one
        assert hasattr(place, constant), name
        put(place, constant, value)
