"""What training programs are made of gives, traced and replayed, the bytes of native tinygrad."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tinygrad import Tensor, dtypes, nn
from tinygrad.helpers import Context

import p2pflop as pf
from p2pflop.job.graph import Op
from p2pflop.kernels.lower import lower
from p2pflop.kernels.plan import decode_plan
from tests.native import SEED, Program, assert_equal_to_native, tensors_of

RNG = np.random.default_rng(1)
ROWS = RNG.standard_normal((12, 4)).astype(np.float32)
BYTES = np.array([3, -1, 0, 2, 5, 1, 4, 7], np.int8)
LABELS = (np.arange(12) % 3).astype(np.int32)

Kind = Callable[[list[Tensor]], nn.optim.Optimizer]
OPTIMIZERS: dict[str, Kind] = {
    "sgd": lambda params: nn.optim.SGD(params, lr=0.1),
    "momentum": lambda params: nn.optim.SGD(params, lr=0.1, momentum=0.9),
    "classic": lambda params: nn.optim.SGD(params, lr=0.1, momentum=0.9, classic=True),
    "nesterov": lambda params: nn.optim.SGD(
        params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "lars": lambda params: nn.optim.LARS(params, lr=0.1),
    "adam": lambda params: nn.optim.Adam(params, lr=0.1),
    "adamw": lambda params: nn.optim.AdamW(params, lr=0.1),
    "lamb": lambda params: nn.optim.LAMB(params, lr=0.1, weight_decay=0.1),
    "muon": lambda params: nn.optim.Muon(params, lr=0.1),
    "fused": lambda params: nn.optim.Adam(params, lr=0.1, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind: str) -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 3, bias=kind != "muon")
        opt = OPTIMIZERS[kind](nn.state.get_parameters(layer))

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = layer(rows).square().mean().backward()
            return {"loss": loss.realize(*opt.schedule_step())}

        return Program(train, tensors_of(layer=layer, opt=opt))

    assert_equal_to_native(make)


def test_a_group_of_optimizers_and_batch_norm_statistics() -> None:
    def make() -> Program:
        rows, norm, layer = Tensor(ROWS), nn.BatchNorm(4), nn.Linear(4, 2)
        opt = nn.optim.OptimizerGroup(
            nn.optim.SGD(nn.state.get_parameters(norm), lr=0.1),
            nn.optim.Adam(nn.state.get_parameters(layer), lr=0.1),
        )

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = layer(norm(rows)).square().mean().backward()
            return {"loss": loss.realize(*opt.schedule_step())}

        def test() -> dict[str, Tensor]:
            return {"mean": norm(rows).mean()}

        return Program(train, tensors_of(norm=norm, layer=layer), {2: test})

    assert_equal_to_native(make)


def test_random_tensors_of_every_kind() -> None:
    weights = Tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    drawn: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: Tensor.rand(3).cat(Tensor.uniform(2, low=-1.0, high=3.0)),
        "normal": lambda: Tensor.randn(5) + Tensor.normal(5, mean=2.0, std=0.5),
        "scaled": lambda: Tensor.scaled_uniform(6) + Tensor.glorot_uniform(6, 1).flatten(),
        "kaiming": lambda: (Tensor.kaiming_normal(3, 4) + Tensor.kaiming_uniform(3, 4)).flatten(),
        "integers": lambda: Tensor.randint(3, low=3, high=100),
        "order": lambda: Tensor.randperm(9),
        "picked": lambda: weights.multinomial(4).cat(weights.multinomial(4, replacement=True)),
        "half": lambda: Tensor.rand(6, dtype=dtypes.half),
        "brain": lambda: Tensor.randn(6, dtype=dtypes.bfloat16),
        "dropped": lambda: weights.dropout(0.4),
    }

    def make() -> Program:
        states = {
            name: Tensor.zeros(one.shape, dtype=one.dtype).contiguous()
            for name, one in ((name, draw()) for name, draw in drawn.items())
        }
        Tensor.manual_seed(SEED)

        def draw_all() -> dict[str, Tensor]:
            for name, draw in drawn.items():
                states[name].assign(draw())
            return {"scalar": Tensor.rand()}

        return Program(draw_all, {f"states.{name}": state for name, state in states.items()})

    assert_equal_to_native(make, 2)


@pytest.mark.parametrize("clip", ["by norm", "by value"])
def test_gradient_clipping(clip: str) -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.Adam(nn.state.get_parameters(layer), lr=0.1)

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = layer(rows).square().mean().backward()
            gradients = [param.grad for param in opt.params if param.grad is not None]
            norm = Tensor.usum(*[gradient.square().sum() for gradient in gradients]).sqrt()
            for param, gradient in zip(opt.params, gradients, strict=True):
                if clip == "by norm":
                    param.grad = gradient * (1 / (norm + 1e-6)).clip(max_=1.0)
                else:
                    gradient.assign(gradient.clip(-0.01, 0.01))
            return {"loss": loss.realize(norm, *opt.schedule_step()), "norm": norm}

        return Program(train, tensors_of(layer=layer, opt=opt))

    assert_equal_to_native(make)


def test_writing_by_index_and_scattering() -> None:
    def make() -> Program:
        line, table = Tensor.zeros(6).contiguous(), Tensor.zeros(4, 3).contiguous()
        place = Tensor.zeros(2, dtype=dtypes.int32).contiguous()

        def write() -> dict[str, Tensor]:
            line[place[0:1] % 6] = place.sum().float() + 5
            table[Tensor([1, 3])] = place[0].float() + 1
            table[Tensor([0, 2]), Tensor([1, 2])] = 9.0
            line.assign(line.scatter(0, place % 6, 3.0, reduce="add"))
            place.assign(place + Tensor([1, 2]))
            return {"gathered": line.gather(0, (place + 3) % 6).sum()}

        return Program(write, tensors_of(line=line, table=table, place=place))

    assert_equal_to_native(make)


def test_small_lists_of_any_rank_in_and_outside_of_the_step() -> None:
    outside = [Tensor([[1.0, 2.0], [3.0, 4.0]]), Tensor([[[1, 2]], [[3, 4]]]), Tensor([5.0])]

    def make() -> Program:
        rows = Tensor(ROWS[:4, :2])
        state = Tensor([[0.5, 0.25], [0.125, 2.0]]).contiguous()

        def step() -> dict[str, Tensor]:
            inside = Tensor([[0.1, 0.9], [1.0, -2.0]])
            scores = rows @ inside + outside[2].reshape(1, 1)
            loss = scores.sparse_categorical_crossentropy(Tensor([0, 1, 1, 0]))
            counted = Tensor.zeros(6).scatter(0, Tensor([1, 2, 3, 3]), rows[:, 0])
            image = rows.reshape(1, 1, 4, 2).conv2d(Tensor([[[[1.0, -1.0]]]]))
            state.assign(state @ outside[0] * 0.1 + inside.T)
            return {
                "loss": (loss + image.sum() + counted[3]).realize(state),
                "hot": Tensor([1, 2, 3, 3]).one_hot(6) * outside[1].sum(),
            }

        return Program(step, {"state": state})

    assert_equal_to_native(make)


def test_embeddings_and_losses_by_class_are_gathers_where_it_matters() -> None:
    def make() -> Program:
        labels, table, layer = Tensor(LABELS), nn.Embedding(50, 3), nn.Linear(3, 3)
        opt = nn.optim.SGD(nn.state.get_parameters([table, layer]), lr=0.1, momentum=0.5)

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            scores = layer(table(labels * 7))
            loss = scores.sparse_categorical_crossentropy(labels)
            loss = loss + scores.cross_entropy(labels.one_hot(3))
            loss = (loss + scores.log_softmax().nll_loss(labels)).backward()
            return {"loss": loss.realize(*opt.schedule_step())}

        return Program(train, tensors_of(table=table, layer=layer))

    replayed = assert_equal_to_native(make)
    (train,) = {phase.graph for phase in replayed.job.work.phases}
    ops = [node.op for node in replayed.job.graphs[train].graph.nodes]
    assert Op.GATHER in ops


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_elements_picked_along_an_axis_cost_what_is_picked(dim: int) -> None:
    shape = (6, 7, 8)

    def make() -> Program:
        table = Tensor.randn(*shape).contiguous()
        opt = nn.optim.SGD([table], lr=0.1)
        places = [Tensor.arange(4 * 5 * 6).reshape(4, 5, 6) * 5, Tensor(BYTES, dtype=dtypes.int8)]
        chosen = places[0].cast(dtypes.int64) % (shape[dim] + 2) - 1  # beyond both ends too

        def pick() -> dict[str, Tensor]:
            opt.zero_grad()
            few = table.gather(dim, chosen)
            bytes_ = table.permute(2, 0, 1).flip(1).gather(dim, places[1].reshape(2, 2, 2))
            loss = few.square().sum() + (bytes_ * 3).sum()
            doubled = few * 2
            return {"loss": loss.backward().realize(doubled, *opt.schedule_step()), "few": doubled}

        return Program(pick, tensors_of(opt=opt, table=table))

    replayed = assert_equal_to_native(make)
    (pick,) = {phase.graph for phase in replayed.job.work.phases}
    ops = [node.op for node in replayed.job.graphs[pick].graph.nodes]
    assert ops.count(Op.GATHER) == 2


@pytest.mark.parametrize(("rows", "columns"), [(64, 1000), (2, 50_257), (1, 32_768)])
def test_few_of_many_cost_what_is_picked_whatever_the_table(rows: int, columns: int) -> None:
    table = Tensor(np.ones((rows, columns), np.float32))
    wide = Tensor(np.ones((columns, 3), np.float32))
    places = Tensor((np.arange(rows * 4) * 7 % columns).reshape(rows, 4).astype(np.int32))

    def pick() -> dict[str, Tensor]:
        return {"columns": table.gather(1, places), "rows": wide[places[0]]}

    traced = pf.trace(pick, steps=1).checked
    [(graph, checked)] = traced.graphs.items()
    [metered] = [line.flop for line in traced.cost.lines if line.graph == graph]
    assert metered <= 20 * rows * 4 + 20 * 4 * 3
    assert decode_plan(lower(checked)).flop <= metered


@pytest.mark.parametrize("columns", [40_000, 32_771])
def test_a_wide_table_changes_no_bytes_of_long_sums(columns: int) -> None:
    numbers = np.random.default_rng(3).standard_normal((2, columns)).astype(np.float32)

    def make() -> Program:
        table, line = Tensor(numbers), Tensor(numbers[0])
        opt = nn.optim.SGD([table], lr=0.1)

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            picked = line[Tensor([5, columns - 1])]
            loss = (table.square().sum() + (table * line).max() + picked.sum()).backward()
            total = (table.sum(1) * 3).sum()
            return {"loss": loss.realize(total, *opt.schedule_step()), "total": total}

        return Program(train, tensors_of(opt=opt, table=table))

    assert_equal_to_native(make)


def test_half_precision_with_a_loss_scale() -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.SGD(nn.state.get_parameters(layer), lr=0.1)
        scale = Tensor.full((1,), 2.0**15).contiguous()
        good = Tensor.zeros(1, dtype=dtypes.int32).contiguous()

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            scores = rows.half().linear(layer.weight.half().T, layer.bias.half())
            loss = scores.float().square().mean()
            (loss * scale.sum()).backward()
            finite = Tensor(True)
            for param in opt.params:
                param.grad = param.grad / scale
                finite = finite & param.grad.isfinite().all()
            for param in opt.params:
                param.grad = finite.where(param.grad, 0)
            updates = opt.schedule_step()
            scale.assign(finite.where((good >= 1).where(scale * 2, scale), scale / 2))
            good.assign(finite.where((good + 1) % 2, 0).cast(dtypes.int32))
            return {"loss": loss.realize(finite, scale, good, *updates), "finite": finite}

        return Program(train, tensors_of(layer=layer, scale=scale, good=good))

    assert_equal_to_native(make, 4)


def test_brain_floats_and_other_dtypes_as_state() -> None:
    def make() -> Program:
        rows, weight = Tensor(ROWS), Tensor.uniform(4, 2, low=-1, high=1.0, dtype=dtypes.bfloat16)
        opt = nn.optim.Adam([weight], lr=0.1)
        double = Tensor.ones(4, dtype=dtypes.float64).contiguous()
        byte = Tensor.ones(4, dtype=dtypes.uint8).contiguous()
        flag = Tensor.zeros(3, dtype=dtypes.bool).contiguous()

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = (rows.cast(dtypes.bfloat16) @ weight).square().mean().backward()
            double.assign(double * 1.1 + double.sqrt())
            byte.assign(byte * 3)
            flag.assign(flag.logical_not())
            return {"loss": loss.realize(double, byte, flag, *opt.schedule_step())}

        return Program(
            train, tensors_of(weight=weight, opt=opt, double=double, byte=byte, flag=flag)
        )

    assert_equal_to_native(make)


def test_gradients_summed_up_in_tensors_of_their_own() -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.Adam(nn.state.get_parameters(layer), lr=0.1)
        sums = [Tensor.zeros(*param.shape).contiguous() for param in opt.params]

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = layer(rows[Tensor.randint(4, high=12)]).square().mean().backward()
            for total, param in zip(sums, opt.params, strict=True):
                total.assign(total + param.grad / 2)
            return {"loss": loss.realize(*sums)}

        def apply() -> None:
            for param, total in zip(opt.params, sums, strict=True):
                param.grad = total * 1
            update_and_clear(opt, sums)

        return Program(train, tensors_of(layer=layer, opt=opt, sums=sums), {2: apply})

    assert_equal_to_native(make, 4)


def update_and_clear(opt: nn.optim.Optimizer, sums: list[Tensor]) -> None:
    with Context(TRAINING=1):
        updates = opt.schedule_step()
    for total in sums:
        total.assign(Tensor.zeros_like(total))
    Tensor.realize(*updates, *sums)


def test_gradients_that_have_zeros_before_the_trace_add_up() -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.Adam(nn.state.get_parameters(layer), lr=0.1)
        sums = [Tensor.zeros(*param.shape).contiguous() for param in opt.params]
        for param, total in zip(opt.params, sums, strict=True):
            param.grad = total

        def train() -> dict[str, Tensor]:
            loss = layer(rows[Tensor.randint(4, high=12)]).square().mean().backward()
            return {"loss": loss.realize(*sums)}

        return Program(
            train,
            tensors_of(layer=layer, opt=opt, sums=sums),
            {2: lambda: update_and_clear(opt, sums)},
        )

    assert_equal_to_native(make, 4)


def test_moving_averages_and_best_weights() -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.SGD(nn.state.get_parameters(layer), lr=0.5)
        mean, kept = layer.weight.clone(), layer.weight.clone()
        best = Tensor.full((1,), 1e9).contiguous()

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = layer(rows[Tensor.randint(4, high=12)]).square().mean().backward()
            updates = opt.schedule_step()
            mean.assign(mean * 0.9 + layer.weight * 0.1)
            return {"loss": loss.realize(mean, *updates)}

        def test() -> dict[str, Tensor]:
            loss = layer(rows).square().mean()
            better = loss < best
            kept.assign(better.where(layer.weight, kept))
            best.assign(better.where(loss, best))
            return {"loss": loss.realize(kept, best)}

        return Program(train, tensors_of(layer=layer, mean=mean, kept=kept, best=best), {2: test})

    assert_equal_to_native(make, 6)


def test_two_networks_that_train_in_turn() -> None:
    def make() -> Program:
        rows, maker, judge = Tensor(ROWS), nn.Linear(2, 4), nn.Linear(4, 1)
        maker_opt = nn.optim.SGD(nn.state.get_parameters(maker), lr=0.1)
        judge_opt = nn.optim.SGD(nn.state.get_parameters(judge), lr=0.1)

        def judge_step() -> dict[str, Tensor]:
            judge_opt.zero_grad()
            made = maker(Tensor.randn(6, 2)).detach()
            loss = (judge(made).softplus().mean() + (-judge(rows)).softplus().mean()).backward()
            return {"judge": loss.realize(*judge_opt.schedule_step())}

        def maker_step() -> dict[str, Tensor]:
            maker_opt.zero_grad()
            loss = (-judge(maker(Tensor.randn(6, 2)))).softplus().mean().backward()
            with Context(TRAINING=1):
                updates = maker_opt.schedule_step()
            return {"maker": loss.realize(*updates)}

        return Program(judge_step, tensors_of(maker=maker, judge=judge), {2: maker_step})

    assert_equal_to_native(make, 4)


def test_norms_and_transposed_convolutions() -> None:
    def make() -> Program:
        rows = Tensor(ROWS)
        net = [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)]
        up = nn.ConvTranspose2d(4, 2, 2)
        opt = nn.optim.SGD(nn.state.get_parameters([net, up]), lr=0.1)

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            image = net[1](net[0](rows)).reshape(3, 4, 2, 2)
            loss = up(net[2](image)).square().mean().backward()
            return {"loss": loss.realize(*opt.schedule_step())}

        return Program(train, tensors_of(net=net, up=up))

    assert_equal_to_native(make)
