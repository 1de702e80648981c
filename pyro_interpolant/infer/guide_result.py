r"""How good a guide has become."""

from typing import NamedTuple

from ..distributions.report import duration, with_error
from ..training.fitting import FitResult
from .smc.train import RoundsResult


class GuideResult(NamedTuple):
    r"""How good a guide has become, by importance weights of fresh draws.

    Attributes:
        k_hat: Pareto's k-hat, of the tail of the weights: below 0.5 all is well, above 0.7 none of
            this is reliable, unless 99% of the draws are effective: then it is of a tail too
            small to matter.
        ess: The effective sample size of ``draws`` draws.
        log_evidence: An estimate of the model's log-evidence, nats.
        log_evidence_stderr: Its standard error, of chance and of the flow's solver, whose part is
            what doubling its steps changes; too small where k-hat is large.
        draws: The number of fresh draws these come from.
        verdict: What follows, in a sentence.
        seconds: The duration.
        training: What the training did.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float
    draws: int
    verdict: str
    seconds: float
    training: FitResult | RoundsResult

    def __repr__(self) -> str:
        """Say the verdict, the evidence, the time it took, and what the training did."""
        evidence = with_error(self.log_evidence, self.log_evidence_stderr)
        return (
            f"{self.verdict}\nlog-evidence {evidence} nats, in {duration(self.seconds)}\n"
            f"training: {self.training}"
        )
