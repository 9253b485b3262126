"""Things to be rewritten, as a user's library would have them."""

import functools

import torch


def scaled(x, factor=2.0, *, offset=0.0):
    """Defaults of both kinds."""
    return x * factor + offset


@torch.fx.wrap
def wrapped_for_fx(x):
    return x + 1


def _make_closed():
    weight = 2.0

    def closed(x):
        return x * weight

    return closed


closed = _make_closed()


def _make_twice_closed():
    weight, bias = 2.0, 1.0

    def twice_closed(x, power=1):
        return (x * weight + bias) ** power

    return twice_closed


twice_closed = _make_twice_closed()


def _traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@_traced
def decorated(x):
    return x + 1


def steps(x, number=3):
    """A generator."""
    for step in range(number):
        yield x * step


def factorial(n):
    """Recursive."""
    return 1 if n == 0 else n * factorial(n - 1)


def with_default_argument(x, function=scaled):
    return function(x)


alias = scaled
in_tuple = (scaled,)
in_dict = {"scaled": [scaled]}
partial = functools.partial(scaled, offset=1.0)
lru = functools.lru_cache(scaled)


class Base:
    factor = 2.0

    def method(self, x):
        return x * self.factor

    def other(self, x):
        return self.method(x)

    @classmethod
    def class_method(cls, x):
        return x * cls.factor

    @staticmethod
    def static_method(x):
        return x * 2.0

    @property
    def prop(self):
        return self.factor


class Derived(Base):
    factor = 3.0


class Unrelated(Base):
    factor = 5.0


class Calling(Base):
    def method(self, x):
        return super().method(x) + 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Net(torch.nn.Module):
    """Calls what a test puts into it, with its input."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@torch.library.custom_op("rewrite_samples::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@tripled.register_fake
def _(x):
    return torch.empty_like(x)
