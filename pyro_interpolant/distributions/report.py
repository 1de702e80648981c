"""What training measured of a distribution, in nats: kept with it, and in its file."""

import math
from dataclasses import dataclass

GAUSSIAN = "one Gaussian"


@dataclass(frozen=True, repr=False)
class Report:
    r"""What a training run measured. Printed, it is one line.

    Densities are those of the distribution's own values, on their support; of named sites, those
    of packed vectors.

    Attributes:
        dim: D, the number of unconstrained coordinates.
        rows: The number of rows that weigh as much, those held out included; infinite where nobody
            counted a stream.
        seconds: The duration of training, without calibration.
        best_step: The step whose weights were kept.
        steps: The number of steps taken.
        log_prob_error: The mean absolute error of ``log_prob`` that the solver makes, nats.
        sample_error: The root mean square error that the solver makes in samples, in standard
            deviations; of images, for which it is calibrated by that, and not by ``log_prob``.
        held_out: The mean log-density of rows held out, nats; None where there is no density, or
            was no time.
        held_out_stderr: Its standard error, nats.
        reference: The mean log-density of the same rows, nats, of one Gaussian fitted to the
            training rows in unconstrained coordinates, its mean linear in the context; for angles
            of the uniform density.
        reference_name: Which of the two it is; of a population learned from noisy rows, ``"the
            start"``.
        held_out_name: What ``held_out`` is the mean of, where it is not the density: of such a
            population, the log-evidence of rows.
    """

    dim: int
    rows: float
    seconds: float
    best_step: int
    steps: int
    log_prob_error: float | None = None
    held_out: float | None = None
    held_out_stderr: float | None = None
    reference: float | None = None
    reference_name: str = GAUSSIAN
    held_out_name: str = "held-out"
    sample_error: float | None = None

    def __repr__(self) -> str:
        """Say all in one line."""
        rows = f" from {self.rows:,.0f} rows" if math.isfinite(self.rows) else ""
        found = [f"{self.dim}-d density{rows} in {duration(self.seconds)}: "]
        if self.held_out is not None and self.held_out_stderr is not None:
            digits = decimals(self.held_out_stderr)
            value = with_error(self.held_out, self.held_out_stderr)
            found[0] += f"{self.held_out_name} {value}"
            found[0] += f" nats{beside(self.reference, self.reference_name, digits)}; "
        if self.log_prob_error is not None:
            found.append(f"log_prob within {self.log_prob_error:.1g} nats; ")
        if self.sample_error is not None:
            found.append(
                f"samples within {self.sample_error:.1g} standard deviations, log_prob not "
                "calibrated; "
            )
        return "".join(found) + f"weights of step {self.best_step:,} of {self.steps:,}"


def decimals(error: float) -> int:
    """Return how many decimals of a number an error leaves: two of the error at most."""
    if not 0 < error < math.inf:
        return 2
    return max(0, min(6, 1 - math.floor(math.log10(error))))


def with_error(value: float, error: float) -> str:
    """Return a number and its error in as many decimals as that leaves."""
    digits = decimals(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def beside(reference: float | None, name: str, digits: int) -> str:
    """Return what a held-out density is compared with, in brackets; nothing for None."""
    return "" if reference is None else f" ({name} {reference:.{digits}f})"


def duration(seconds: float) -> str:
    """Return a duration in seconds, or in minutes from two of them."""
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"
