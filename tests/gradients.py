"""Gradients of a frozen flow in where it starts, which solves of several kinds must agree on."""

import torch

from pyro_interpolant import InterpolantDistribution, InterpolantTransform


def flow(velocity, solver):
    """A frozen flow in three dimensions, in the type of the velocity."""
    transform = InterpolantTransform(velocity, 3, solver=solver).to(next(velocity.parameters()))
    a = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.8, 0.0], [0.1, 0.0, 1.2]])
    transform.flow.whitening.set(torch.ones(3).to(a), a)
    return transform.requires_grad_(requires_grad=False)


def of_sample(transform, z):
    x = transform(z)
    return x.square().sum() + x.sin().sum() + transform.log_abs_det_jacobian(z, x).sum()


def of_density(transform, y):
    return InterpolantDistribution(transform).log_prob(y).sum()


def at_a_time(transform, y):
    return InterpolantDistribution(transform).at(0.6).log_prob(y).sum()


def gradient(value, transform, z):
    z = z.clone().requires_grad_()
    (out,) = torch.autograd.grad(value(transform, z), z)
    return out
