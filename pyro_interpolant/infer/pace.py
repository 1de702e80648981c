"""How long, and at which rate, a guide learns from simulations."""

import math
from typing import Any

from torch import Tensor, nn

from ..nn.embedded import EmbeddedVelocity
from ..training.clock import Clock

_TRAINING_SHARE = 0.9  # of the time, for simulations and training; the rest: the verdict
# The learning rate with an embedding, whose training 1e-2 makes unstable: after 1,000 steps of 256
# sets of 20 rows, a posterior of two modes had 1.4 nats at this rate and 0.5 at 1e-2.
_EMBEDDING_RATE = 2e-3
# Of a run with a time limit: the fewest steps, else one for each simulation; and the patience. So
# the rate falls to the end (a gain of 0.26 nats on gaussian_mixture, 1,000 simulations), and a
# loss that rises early by chance does not end the run (0.14 at 10,000).
_FEWEST_STEPS, _PATIENCE = 2000, 100


def pace(velocity: nn.Module, rows: object, clock: Clock, share: float) -> dict[str, Any]:
    """Return options of :func:`~pyro_interpolant.fit`, where the caller gives no others.

    Args:
        velocity: The network.
        rows: Packed rows, ``(N, D)``, or batches of them.
        clock: The time.
        share: Of it, when training is to end, but for the verdict.
    """
    options: dict[str, Any] = {"max_seconds": clock.part(share * _TRAINING_SHARE)}
    if isinstance(velocity, EmbeddedVelocity) and velocity.embedding is not None:
        options["learning_rate"] = _EMBEDDING_RATE
    if isinstance(rows, Tensor) and clock.limit < math.inf:
        options |= {"steps": max(_FEWEST_STEPS, len(rows)), "patience": _PATIENCE}
    return options
