"""Many operations of tinygrad, each a function without arguments that does the same each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from tinygrad import Tensor, Variable, dtypes, nn
from tinygrad.helpers import Context

Case = Callable[[], Tensor | Sequence[Tensor]]


def _numbers(*shape: int, low: float = -2.0, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    return Tensor(generator.uniform(low, 2.0, shape).astype(np.float32))


def _x() -> Tensor:
    return _numbers(3, 4)


def _y() -> Tensor:
    return _numbers(3, 4, seed=1)


def _positive() -> Tensor:
    return _numbers(3, 4, low=0.1)


def _whole() -> Tensor:
    return Tensor(np.arange(-6, 6, dtype=np.int32).reshape(3, 4))


def _image() -> Tensor:
    return _numbers(2, 3, 9, 9)


def _flags() -> Tensor:
    return Tensor(np.array([True, False, True, True, False]))


def _embedded() -> Tensor:
    layer = nn.Embedding(5, 3)
    layer.weight = _numbers(5, 3)
    return layer(Tensor([[1, 2], [0, 4]]))


CREATION: Final[dict[str, Case]] = {
    "full": lambda: Tensor.full((2, 3), 4.0).contiguous(),
    "zeros": lambda: Tensor.zeros(3, 2).contiguous(),
    "ones": lambda: Tensor.ones(2, 2, dtype=dtypes.int8).contiguous(),
    "zero dimensions": lambda: Tensor(3.0).contiguous() + 1,
    "a list": lambda: Tensor([[1, 2], [3, 4]]) + 0,
    "nested lists of floats": lambda: Tensor([[1.5], [2.5]]) * 1,
    "bytes": lambda: Tensor(b"abcd") + 1,
    "numpy": lambda: Tensor(np.arange(5, dtype=np.int16)) * 2,
    "numpy without dimensions": lambda: Tensor(np.array(2.5, np.float32)) + _x(),
    "64 bits of numpy": lambda: Tensor(np.array([1.0, 2.0])) * 3,
    "more than a write": lambda: Tensor(np.arange(40_000, dtype=np.float32)) + 1,
    "arange": lambda: Tensor.arange(10).contiguous(),
    "arange by steps": lambda: Tensor.arange(2, 20, 3).contiguous(),
    "arange of floats": lambda: Tensor.arange(0, 1, 0.1).contiguous(),
    "arange downwards": lambda: Tensor.arange(5, 0, -1).contiguous(),
    "linspace": lambda: Tensor.linspace(0, 1, 7).contiguous(),
    "eye": lambda: Tensor.eye(4).contiguous(),
    "eye wide": lambda: Tensor.eye(3, 5).contiguous(),
    "full_like": lambda: _x().full_like(2).contiguous(),
    "zeros_like": lambda: _x().zeros_like().contiguous(),
    "ones_like": lambda: _x().ones_like().contiguous(),
    "meshgrid": lambda: Tensor.arange(3).meshgrid(Tensor.arange(2))[0].contiguous(),
    "one_hot": lambda: Tensor([1, 0, 2]).one_hot(4),
    "tril": lambda: _x().tril(),
    "triu": lambda: _x().triu(1),
    "diag": lambda: Tensor([1.0, 2.0]).diag(),
    "clone": lambda: _x().clone(),
}

UNARY: Final[dict[str, Case]] = {
    name: (lambda name=name: getattr(_x(), name)())
    for name in (
        "neg", "abs", "sign", "square", "exp", "exp2", "sin", "cos", "tan", "sigmoid", "tanh",
        "sinh", "cosh", "asinh", "relu", "relu6", "elu", "selu", "celu", "gelu", "quick_gelu",
        "silu", "swish", "mish", "softplus", "softsign", "hardswish", "hardsigmoid", "hardtanh",
        "leaky_relu", "logsigmoid", "floor", "ceil", "round", "trunc", "reciprocal", "isnan",
        "isinf", "isfinite", "erf", "atan",
    )
} | {
    name: (lambda name=name: getattr(_positive(), name)())
    for name in ("sqrt", "rsqrt", "log", "log2", "log10")
} | {
    "asin": lambda: (_x() / 3).asin(),
    "acos": lambda: (_x() / 3).acos(),
    "atanh": lambda: (_x() / 3).atanh(),
    "acosh": lambda: (_positive() + 1).acosh(),
    "log of negatives": lambda: _x().log(),
    "division by zero": lambda: 1 / _whole().relu().float(),
    "logical_not": lambda: _flags().logical_not(),
    "bitwise_not": lambda: _whole().bitwise_not(),
    "invert": lambda: ~_whole(),
    "clamp": lambda: _x().clip(-1, 1),
    "nan_to_num": lambda: (_x().log()).isnan().where(0, _x()),
}  # fmt: skip

BINARY: Final[dict[str, Case]] = {
    "add": lambda: _x() + _y(),
    "sub": lambda: _x() - _y(),
    "mul": lambda: _x() * _y(),
    "div": lambda: _x() / _y(),
    "pow": lambda: _positive() ** _y(),
    "pow 2": lambda: _x() ** 2,
    "pow 0.5": lambda: _positive() ** 0.5,
    "rpow": lambda: 2 ** _x(),
    "floor division": lambda: _whole() // 4,
    "floor division of negatives": lambda: _whole() // -3,
    "mod": lambda: _whole() % 3,
    "mod of floats": lambda: _x() % 0.7,
    "maximum": lambda: _x().maximum(_y()),
    "minimum": lambda: _x().minimum(0),
    "less": lambda: _x() < _y(),
    "greater": lambda: _x() > 0,
    "equal": lambda: _whole() == 2,
    "not equal": lambda: _whole() != 2,
    "at least": lambda: _x() >= _y(),
    "and": lambda: _whole() & 6,
    "or": lambda: _whole() | 1,
    "xor": lambda: _whole() ^ 5,
    "shift left": lambda: _whole() << 2,
    "shift right": lambda: _whole() >> 1,
    "where": lambda: (_x() > 0).where(_x(), _y()),
    "where of constants": lambda: (_x() > 0).where(1, 0),
    "lerp": lambda: _x().lerp(_y(), 0.3),
    "broadcast rows": lambda: _x() + _numbers(4),
    "broadcast columns": lambda: _x() * _numbers(3, 1),
    "broadcast both": lambda: _numbers(3, 1) + _numbers(1, 5),
    "integers and floats": lambda: _whole() + _x(),
    "bools and integers": lambda: (_x() > 0) + _whole(),
    "copysign": lambda: _x().abs() * _y().sign(),
    "a chain": lambda: ((_x() + 1) * _y()).exp().sin() / 3,
}

REDUCE: Final[dict[str, Case]] = {
    "sum": lambda: _x().sum(),
    "sum 0": lambda: _x().sum(0),
    "sum 1 kept": lambda: _x().sum(1, keepdim=True),
    "sum of integers": lambda: _whole().sum(),
    "sum of bools": lambda: (_x() > 0).sum(),
    "sum of 8 bits": lambda: Tensor(np.full(300, 7, np.uint8)).sum(),
    "a long sum": lambda: _numbers(70_000).sum(),
    "sums of long rows": lambda: _numbers(3, 40_000).sum(1),
    "mean": lambda: _x().mean(),
    "mean 0": lambda: _x().mean(0),
    "max": lambda: _x().max(),
    "max 1": lambda: _x().max(1),
    "min": lambda: _x().min(0),
    "max of integers": lambda: _whole().max(1),
    "prod": lambda: _x().prod(1),
    "any": lambda: (_x() > 1).any(1),
    "all": lambda: (_x() > -5).all(),
    "var": lambda: _x().var(1),
    "std": lambda: _x().std(),
    "var_mean": lambda: _x().var_mean(0),
    "argmax": lambda: _x().argmax(1),
    "argmax of all": lambda: _x().argmax(),
    "argmin": lambda: _x().argmin(0),
    "softmax": lambda: _x().softmax(),
    "log_softmax": lambda: _x().log_softmax(0),
    "logsumexp": lambda: _x().logsumexp(1),
    "cumsum": lambda: _x().cumsum(1),
    "a long cumsum": lambda: _numbers(600).cumsum(),
    "cumprod": lambda: _x().cumprod(0),
    "cummax": lambda: _x().cummax(1)[0],
    "layernorm": lambda: _x().layernorm(),
    "normalize": lambda: _x().normalize(),
    "sort": lambda: _x().sort(1),
    "argsort": lambda: _x().argsort(0),
    "topk": lambda: _x().topk(2),
    "norm": lambda: _x().square().sum().sqrt(),
}

MOVEMENT: Final[dict[str, Case]] = {
    "reshape": lambda: _x().reshape(2, 6) + 0,
    "flatten": lambda: _image().flatten(1) * 2,
    "permute": lambda: _image().permute(0, 2, 3, 1).contiguous(),
    "transpose": lambda: _x().T.contiguous(),
    "expand": lambda: _numbers(3, 1).expand(3, 4).contiguous(),
    "pad": lambda: _x().pad(((1, 0), (2, 3))),
    "pad with a value": lambda: _x().pad((1, 1), value=7.0),
    "pad reflect": lambda: _image().pad((1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda: _image().pad((2, 1, 0, 1), mode="replicate"),
    "pad circular": lambda: _image().pad((1, 2, 1, 0), mode="circular"),
    "shrink": lambda: _x().shrink(((1, 3), (0, 2))).contiguous(),
    "flip": lambda: _x().flip(1).contiguous(),
    "flip both": lambda: _x().flip((0, 1)) + 1,
    "cat": lambda: _x().cat(_y()),
    "cat 1": lambda: Tensor.cat(_x(), _y(), _x(), dim=1),
    "stack": lambda: Tensor.stack(_x(), _y(), dim=1),
    "repeat": lambda: _x().repeat(2, 3),
    "repeat_interleave": lambda: _x().repeat_interleave(2, dim=0),
    "split": lambda: list(_x().split(2, dim=1)),
    "chunk": lambda: [part.contiguous() for part in _x().chunk(2, dim=1)],
    "roll": lambda: _x().roll(1, 0),
    "squeeze": lambda: _numbers(1, 3, 1).squeeze(0) + 1,
    "unsqueeze": lambda: _x().unsqueeze(1) + 1,
    "unfold": lambda: _numbers(8).unfold(0, 3, 2).contiguous(),
    "view": lambda: _x().view(4, 3).contiguous(),
    "views of views": lambda: _x().T.reshape(2, 6)[:, 1:4].flip(0).contiguous(),
    "diagonal": lambda: _numbers(4, 4).diagonal().contiguous(),
}

INDEXING: Final[dict[str, Case]] = {
    "a row": lambda: _x()[1].contiguous(),
    "an element": lambda: _x()[1, 2].contiguous(),
    "a slice": lambda: _x()[1:, :2].contiguous(),
    "steps": lambda: _x()[:, ::2].contiguous(),
    "backwards": lambda: _x()[::-1].contiguous(),
    "an ellipsis": lambda: _image()[..., 3].contiguous(),
    "a new axis": lambda: _x()[:, None].contiguous(),
    "by a tensor": lambda: _x()[Tensor([2, 0, 1])],
    "by negative numbers": lambda: _x()[Tensor([-1, -2])],
    "by two tensors": lambda: _x()[Tensor([0, 1]), Tensor([3, 2])],
    "by a list": lambda: _x()[[0, 2]],
    "columns by a tensor": lambda: _x()[:, Tensor([0, 3])],
    "rows of a wide table": lambda: _numbers(40_000, 2)[Tensor([5, 39_999])],
    "gather": lambda: _x().gather(1, Tensor([[0], [1], [2]])),
    "gather 0": lambda: _x().gather(0, Tensor([[0, 1, 2, 0]])),
    "take by an embedding": _embedded,
    "scatter": lambda: _x().scatter(1, Tensor([[0], [1], [2]]), 5.0),
    "scatter_reduce": lambda: _x().scatter_reduce(0, Tensor([[0, 0, 1, 1]]), _numbers(1, 4), "sum"),
    "masked_fill": lambda: _x().masked_fill(_x() > 0, -1.0),
    "masked_select": lambda: _x().masked_select(_x() > 0),
    "nonzero": lambda: (_whole() > 2).nonzero(),
    "a mask of size": lambda: _flags().nonzero(size=3),
}


def _set(write: Callable[[Tensor], object], start: Callable[[], Tensor] = _x) -> Case:
    def run() -> Tensor:
        tensor = start().contiguous().realize()
        write(tensor)
        return tensor

    return run


def _set_item(key: object, value: Callable[[], object], start: Callable[[], Tensor] = _x) -> Case:
    return _set(lambda tensor: tensor.__setitem__(key, value()), start)


SETITEM: Final[dict[str, Case]] = {
    "set a row": _set_item(1, lambda: 3.0),
    "set a slice": _set_item((slice(0, 2), slice(1, 3)), lambda: 7.0),
    "set a column": _set_item((slice(None), 2), lambda: _numbers(3)),
    "set an element": _set_item((1, 1), lambda: -1.0),
    "set steps": _set_item((slice(None), slice(None, None, 2)), lambda: 0.0),
    "set by a tensor": _set_item([0, 2], lambda: 9.0),
    "set integers": _set_item(0, lambda: 11, _whole),
    "set from itself": _set(lambda t: t.__setitem__(0, t[1] + t[2])),
    "set twice": _set(lambda t: (t.__setitem__(0, 1.0), t.__setitem__(slice(1, 2), 2.0))),
    "set and add": _set(lambda t: (t.__setitem__(0, 1.0), t.assign(t + 1))),
    "assign": _set(lambda t: t.assign(t * 2)),
    "assign another": _set(lambda t: t.assign(_y())),
    "assign twice": _set(lambda t: (t.assign(t + 1), t.assign(t * t))),
    "assign a sum": _set(lambda t: t.assign(t.sum().expand(3, 4))),
    "assign transposed": _set(lambda t: t.assign(t.T.contiguous()), lambda: _numbers(4, 4)),
    "in place add": _set(lambda t: t.assign(t + _y()).realize()),
}

CASTS: Final[dict[str, Case]] = {
    f"{source.name} to {target.name}": (
        lambda source=source, target=target: (_numbers(3, 4, low=0) * 9).cast(source).cast(target)
    )
    for source in (dtypes.float32, dtypes.int32, dtypes.uint8, dtypes.bool)
    for target in (
        dtypes.bool, dtypes.int8, dtypes.uint8, dtypes.int16, dtypes.uint32, dtypes.int64,
        dtypes.float16, dtypes.float64, dtypes.float32,
    )
    if source is not target
} | {
    "bfloat16": lambda: (_x().bfloat16() * 2).float(),
    "bitcast": lambda: _x().bitcast(dtypes.int32) + 0,
    "bitcast to other width": lambda: _x().bitcast(dtypes.uint8).contiguous(),
    "half arithmetic": lambda: _x().half() * _y().half(),
    "double arithmetic": lambda: _x().double().sin(),
    "long arithmetic": lambda: _whole().cast(dtypes.int64) * 2**33,
    "unsigned wraps": lambda: Tensor([250, 5], dtype=dtypes.uint8) + 10,
    "sum of halves": lambda: _x().half().sum(),
}  # fmt: skip


def _seeded(draw: Callable[[], Tensor]) -> Case:
    def run() -> Tensor:
        Tensor.manual_seed(7)
        return draw()

    return run


RANDOM: Final[dict[str, Case]] = {
    "rand": _seeded(lambda: Tensor.rand(5, 3)),
    "rand twice": _seeded(lambda: Tensor.rand(5) + Tensor.rand(5)),
    "randn": _seeded(lambda: Tensor.randn(4, 4)),
    "randint": _seeded(lambda: Tensor.randint(20, low=-3, high=9)),
    "uniform": _seeded(lambda: Tensor.uniform(6, low=2, high=5)),
    "normal": _seeded(lambda: Tensor.normal(6, mean=1, std=2)),
    "kaiming_uniform": _seeded(lambda: Tensor.kaiming_uniform(4, 4)),
    "glorot_uniform": _seeded(lambda: Tensor.glorot_uniform(4, 4)),
    "randperm": _seeded(lambda: Tensor.randperm(4)),
    "multinomial": _seeded(lambda: Tensor([0.1, 0.4, 0.5]).multinomial(8, replacement=True)),
    "rand_like": _seeded(lambda: _x().rand_like()),
    "randn of halves": _seeded(lambda: Tensor.randn(6, dtype=dtypes.float16)),
    "realized between": _seeded(lambda: Tensor.rand(3).realize() + Tensor.rand(3)),
    "dropout": _seeded(lambda: _training(lambda: _x().dropout(0.5))),
}


def _training(compute: Callable[[], Tensor]) -> Tensor:
    with Context(TRAINING=1):
        return compute()


def _weights(*shape: int) -> Tensor:
    return _numbers(*shape, seed=3) / 4


def _gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> Case:
    def run() -> list[Tensor]:
        left, right = _x().realize(), _y().realize()
        return list(loss(left, right).gradient(left, right))

    return run


NEURAL: Final[dict[str, Case]] = {
    "matmul": lambda: _x() @ _numbers(4, 5),
    "batched matmul": lambda: _numbers(2, 3, 4) @ _numbers(2, 4, 3),
    "a vector": lambda: _numbers(4) @ _numbers(4, 3),
    "dot of vectors": lambda: _numbers(4).dot(_numbers(4, seed=2)),
    "matmul of integers": lambda: _whole() @ _whole().T,
    "matmul of halves": lambda: _x().half() @ _x().half().T,
    "einsum": lambda: Tensor.einsum("ij,kj->ik", _x(), _y()),
    "linear": lambda: _x().linear(_weights(4, 2), _numbers(2)),
    "conv": lambda: _image().conv2d(_weights(4, 3, 3, 3)),
    "conv with stride": lambda: _image().conv2d(_weights(4, 3, 3, 3), stride=2, padding=1),
    "conv with dilation": lambda: _image().conv2d(_weights(2, 3, 3, 3), dilation=2),
    "conv in groups": lambda: _image().conv2d(_weights(3, 1, 3, 3), groups=3),
    "conv with bias": lambda: _image().conv2d(_weights(2, 3, 1, 1), _numbers(2)),
    "conv1d": lambda: _numbers(2, 3, 9).conv2d(_weights(4, 3, 3)),
    "conv_transpose": lambda: _image().conv_transpose2d(_weights(3, 2, 3, 3), stride=2),
    "max_pool": lambda: _image().max_pool2d(2),
    "max_pool with stride": lambda: _image().max_pool2d(3, stride=2),
    "avg_pool": lambda: _image().avg_pool2d(3),
    "interpolate": lambda: _image().interpolate((5, 5)),
    "batchnorm": lambda: _image().batchnorm(
        _numbers(3), _numbers(3), _image().mean((0, 2, 3)), _image().var((0, 2, 3)).rsqrt()
    ),
    "attention": lambda: _numbers(1, 2, 4, 8).scaled_dot_product_attention(
        _numbers(1, 2, 4, 8, seed=1), _numbers(1, 2, 4, 8, seed=2)
    ),
    "causal attention": lambda: _numbers(1, 2, 4, 8).scaled_dot_product_attention(
        _numbers(1, 2, 4, 8), _numbers(1, 2, 4, 8), is_causal=True
    ),
    "cross_entropy": lambda: _x().sparse_categorical_crossentropy(Tensor([0, 1, 3])),
    "binary_crossentropy": lambda: _x().sigmoid().binary_crossentropy(_flags()[:3, None].float()),
    "gradient of a product": _gradients(lambda x, y: (x * y).sum()),
    "gradient of a matmul": _gradients(lambda x, y: (x @ y.T).relu().mean()),
    "gradient of softmax": _gradients(lambda x, y: (x.softmax() * y).sum()),
    "gradient of max": _gradients(lambda x, y: x.maximum(y).max(1).sum()),
    "gradient of a norm": _gradients(lambda x, y: (x.layernorm() * y.exp()).sum()),
}


def _symbolic(compute: Callable[[Tensor, Variable], Tensor], value: int = 3) -> Case:
    def run() -> Tensor:
        bound = Variable("n", 1, 4).bind(value)
        return compute(_numbers(4, 5).realize(), bound)

    return run


SEVERAL: Final[dict[str, Case]] = {
    "two outputs": lambda: [_x() + 1, _x() * 2],
    "an output and what uses it": lambda: (lambda a: [a, a.sum(), a.exp()])(_x() + 1),
    "an expression and its view": lambda: (lambda a: [a.T.contiguous(), a])(_x() * _y()),
    "equal outputs": lambda: [_x() + 1, _x() + 1],
    "contiguous in the middle": lambda: (_x() + 1).contiguous().sum(0).exp(),
    "shares of a rows' slice": lambda: (lambda t: t[1:2].sum() + t[2].max())(_x().realize()),
    "a symbolic size": _symbolic(lambda t, n: t[:n].max(1).max().reshape(1)),
    "a symbolic size of one": _symbolic(lambda t, n: t[:n].sum().reshape(1), 1),
    "a symbolic offset": _symbolic(lambda t, n: t.shrink(((n, n + 1), None)).reshape(5) + 1, 2),
    "a symbolic factor": _symbolic(lambda t, n: t * n),
    "math.inf": lambda: Tensor([math.inf, -math.inf, math.nan]) + 1,
}

TABLE: Final[dict[str, Case]] = {
    f"{group}: {name}": case
    for group, cases in {
        "creation": CREATION,
        "unary": UNARY,
        "binary": BINARY,
        "reduce": REDUCE,
        "movement": MOVEMENT,
        "indexing": INDEXING,
        "setitem": SETITEM,
        "casts": CASTS,
        "random": RANDOM,
        "neural": NEURAL,
        "several": SEVERAL,
    }.items()
    for name, case in cases.items()
}
