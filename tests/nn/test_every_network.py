"""What every network of ``cases.NETWORKS`` must do: one line there is all that a new one needs."""

import pytest
import torch
from cases import FLOWS, NETWORKS
from torch import nn

import pyro_interpolant as pi


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("name", NETWORKS)
def test_its_flow_has_an_inverse_and_the_density_of_its_jacobian(name):
    transform = FLOWS[name](2, solver=pi.FixedGrid(steps=32))
    distribution = pi.InterpolantDistribution(transform)
    w = torch.randn(2)
    y = transform(w)
    torch.testing.assert_close(transform._inverse(y.clone()), w, rtol=0, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(transform._call, w)
    expected = -0.5 * (w.square().sum() + 2 * torch.log(torch.tensor(2 * torch.pi)))
    expected = expected - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(distribution.log_prob(y.clone()), expected, rtol=0, atol=1e-5)
    assert (
        abs(float(torch.linalg.slogdet(jacobian).logabsdet) - transform.flow.whitening.log_det)
        > 1e-3
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_it_sees_its_context_and_treats_rows_apart(name):
    family = FLOWS[name](2, context_dim=3)
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    together = family.condition(context)(x)
    for i in range(4):
        torch.testing.assert_close(family.condition(context[i])(x[i]), together[i])
    assert (together - family.condition(context.flip(0))(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["three", "own"])
def test_a_file_keeps_its_weights(name, tmp_path):
    distribution, x = pi.InterpolantDistribution(FLOWS[name](2)), torch.randn(5, 2)
    pi.save(distribution, tmp_path / "flow.safetensors")
    again = pi.load(tmp_path / "flow.safetensors", velocity=NETWORKS[name](2, 0))
    assert torch.equal(again.log_prob(x), distribution.log_prob(x))


@pytest.mark.usefixtures("_few_held_draws")
@pytest.mark.parametrize(
    ("name", "context_dim"),
    [("own", 0), ("own", 1), pytest.param("two", 1, marks=pytest.mark.slow)],
)
def test_it_can_be_trained(name, context_dim):
    velocity = NETWORKS[name](2, context_dim)
    velocity.event_dim = 2
    before = nn.utils.parameters_to_vector(velocity.parameters()).detach().clone()
    x = torch.randn(300, 2)
    x[:, 1] += x[:, 0] ** 2
    options = {"steps": 30, "seed": 0, "progress": False, "tolerance": 0.1}
    if context_dim:
        transform = pi.ConditionalInterpolantTransform(velocity)
        distribution = pi.ConditionalInterpolantDistribution(transform)
        result = pi.fit(distribution, x, context=torch.rand(300, 1), **options)
    else:
        result = pi.fit(
            pi.InterpolantDistribution(pi.InterpolantTransform(velocity)), x, **options
        )
    assert min(result.validation_losses) < result.validation_losses[0]
    after = nn.utils.parameters_to_vector(velocity.parameters()).detach()
    assert (after - before).abs().max() > 1e-3
