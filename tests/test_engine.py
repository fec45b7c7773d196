"""The training loop: its clock, its moving average, and that stopping it changes nothing."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddb_fast import checkpoint
from ddb_fast.checkpoint import load_tensors
from ddb_fast.config import Optimisation
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.engine import (
    EMA,
    Checkpoints,
    Selection,
    agree,
    build_optimizer,
    fit,
    learning_rate,
    step_seed,
)
from ddb_fast.trackers import RunLog


def test_learning_rate_is_the_authors_schedule():
    """Their GradualWarmupScheduler(2.5, warm_epoch) over CosineAnnealingLR(T_max), by epochs."""
    epochs, warm = 100, 10
    config = Optimisation(
        images=epochs,
        batch_size=1,
        lr=2.5e-4,
        warmup=warm / epochs,
        warmup_from=0.4,
        lr_schedule="cosine-cut",
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.5e-4)
    cosine = CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0)
    expected = [1e-4 * ((2.5 - 1) * e / warm + 1) for e in range(warm)]
    for _ in range(epochs - warm):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    got = [learning_rate(config, e) for e in range(epochs)]
    assert got == pytest.approx(expected, rel=1e-9)
    assert learning_rate(config, epochs) == pytest.approx(6.1e-6, rel=0.02)


def test_cosine_and_constant_schedules():
    cosine = Optimisation(images=1000, batch_size=10, lr=1.0, warmup=0.2)
    assert learning_rate(cosine, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 200) == pytest.approx(1.0)
    assert learning_rate(cosine, 600) == pytest.approx(0.5)
    assert learning_rate(cosine, 1000) == pytest.approx(0.0, abs=1e-12)
    flat = Optimisation(images=1000, batch_size=10, lr=0.3, lr_schedule="constant")
    assert {learning_rate(flat, i) for i in range(0, 1001, 100)} == {0.3}


def test_ema_equals_swa_utils_at_a_fixed_decay():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    size, half_life = 8, 100
    oracle = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (size / half_life)), use_buffers=False
    )
    oracle.update_parameters(network)  # the first call copies
    ema = EMA(network, half_life=half_life, rampup=math.inf)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(20):
        network(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.update_parameters(network)
        ema.update((step + 1) * size, size)
    for name, parameter in oracle.module.named_parameters():
        torch.testing.assert_close(ema.tensors[name], parameter.detach())
    assert torch.equal(ema.tensors["1.running_mean"], network[1].running_mean)


def test_ema_half_life_is_in_images():
    network = nn.Linear(1, 1)
    coarse, fine = (EMA(network, half_life=500, rampup=math.inf) for _ in range(2))
    assert (1 - coarse.weight(10**6, 100)) == pytest.approx((1 - fine.weight(10**6, 10)) ** 10)
    assert 1 - coarse.weight(10**6, 500) == pytest.approx(0.5)
    early = EMA(network, half_life=10**9, rampup=0.05)
    assert 1 - early.weight(2000, 100) == pytest.approx(0.5)


def test_step_seeds_differ_and_fit_a_generator():
    seeds = {
        step_seed(s, stage, i, r) for s in (0, 1) for stage in "ab" for i in (0, 1) for r in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


class Table(nn.Module):
    """A recipe with state: counts visits and lets them weigh the loss."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("visits", torch.zeros(n))

    def forward(self, losses, index):
        self.visits[index] += 1
        return (losses / self.visits[index]).mean()


def train(
    tmp_path, name, *, optimisation=None, stop_after=None, stop_at=None, every=None, selection=None
):
    """Fit a small noisy network; optionally interrupt, as Ctrl-C would, after some steps."""
    torch.manual_seed(1)
    x, y = torch.randn(50, 6), torch.randn(50, 1)
    network = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
    network.eval()  # as a network comes that was asked something before
    recipe = Table(50)
    ema = EMA(network, half_life=64, rampup=0.5)
    config = optimisation or Optimisation(images=240, batch_size=8, lr=0.01, grad_clip=1.0)
    taken = []

    def loss_of(model, index):
        if stop_after is not None and len(taken) == stop_after:
            raise KeyboardInterrupt
        assert model.training
        taken.append(index)
        noise = 0.1 * torch.randn(len(index), 6)
        losses = (model(x[index] + noise) - y[index]).square().mean(1)
        return recipe(losses, index)

    accelerator = Accelerator(cpu=True)
    fit(
        accelerator,
        network,
        loss_of,
        config=config,
        sampler=ShuffledSampler(50, seed=3),
        stage="test",
        seed=5,
        log=RunLog(accelerator, tmp_path / "log.jsonl"),
        checkpoints=Checkpoints(path=tmp_path / name / "state.safetensors", images=every),
        recipe=recipe,
        stop_at=stop_at,
        ema=ema,
        selection=selection,
        show_progress=False,
    )
    return network.state_dict(), ema.tensors, recipe.visits, taken


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, optimizer):
    config = Optimisation(
        images=240, batch_size=8, lr=0.01, weight_decay=0.1, grad_clip=1.0, optimizer=optimizer
    )
    straight = train(tmp_path, "a", optimisation=config)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "b", optimisation=config, stop_after=17, every=40)
    resumed = train(tmp_path, "b", optimisation=config, every=40)
    assert len(resumed[3]) == 30 - 15, "it continued from the checkpoint, not from the start"
    for before, after in zip(straight[:2], resumed[:2], strict=True):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
    assert torch.equal(straight[2], resumed[2])


def test_stopping_early_cuts_the_training_and_changes_none_of_its_steps(tmp_path):
    config = Optimisation(images=240, batch_size=8, lr=0.01, warmup=0.1)
    state, *_, taken = train(tmp_path, "a", optimisation=config, stop_at=77)
    assert len(taken) == 10
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "b", optimisation=config, stop_after=10, every=80)
    whole, _ = load_tensors(tmp_path / "b" / "state.safetensors")
    for name, tensor in state.items():
        assert torch.equal(whole[f"model.{name}"], tensor), name


def plain_fit(
    network, loss_of, folder, *, seed=0, stage="test", accelerator=None, options=None, **config
):
    """`fit` on twenty images, with `options` of its own and a configuration."""
    accelerator = accelerator or Accelerator(cpu=True)
    return fit(
        accelerator,
        network,
        loss_of,
        config=Optimisation(**config),
        sampler=ShuffledSampler(20, seed=3),
        stage=stage,
        seed=seed,
        log=RunLog(accelerator, folder / "log.jsonl"),
        checkpoints=Checkpoints(path=folder / "state.safetensors"),
        show_progress=False,
        **(options or {}),
    )


@pytest.mark.parametrize("apart", [False, True], ids=["one norm", "a norm each"])
def test_five_steps_worked_out_in_numpy(tmp_path, apart):
    """SGD with momentum and decay on clipped gradients, a rate for each step, and the average.

    Two linear models side by side, whose squared errors add up; in batches of two parts.
    """
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(20, 3)), generator.normal(size=(20, 2)) * [1, 9]
    first = generator.normal(size=(2, 3))
    network = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(2)).double()
    for part, weight in zip(network, first, strict=True):
        part.weight.data = torch.tensor(weight)[None]
    ema = EMA(network, half_life=24, rampup=1.0)
    inputs, labels = torch.tensor(x), torch.tensor(y)

    def loss_of(model, index):
        answers = torch.cat([part(inputs[index]) for part in model], 1)
        return (answers - labels[index]).square().mean(0).sum()

    plain_fit(
        network, loss_of, tmp_path, images=40, batch_size=8, optimizer="sgd", lr=0.2, momentum=0.8,
        weight_decay=0.1, warmup=0.5, warmup_from=0.1, grad_clip=2.0, accumulate=2,
        options={"clipped": tuple(network) if apart else (), "ema": ema},
    )  # fmt: skip
    weights, average, velocity, losses = first.copy(), first.copy(), 0.0, 0.0
    # From .02 by .18 over 20 images; then half a cosine over the other 20.
    rates = [0.02, 0.092, 0.164] + [0.1 * (1 + math.cos(math.pi * at)) for at in (0.2, 0.6)]
    for step, rate in enumerate(rates):
        index = ShuffledSampler(20, seed=3).batch(step, 8).numpy()
        apart_by = x[index] @ weights.T - y[index]
        losses += np.square(apart_by).sum() / 8
        gradient = 2 * apart_by.T @ x[index] / 8
        norm = np.linalg.norm(gradient, axis=1 if apart else None, keepdims=True)
        gradient *= np.minimum(1, 2.0 / norm)
        gradient += 0.1 * weights
        velocity = gradient if step == 0 else 0.8 * velocity + gradient
        weights = weights - rate * velocity
        kept = 0.5 ** (8 / min(24, 8 * (step + 1)))
        average = kept * average + (1 - kept) * weights
    for found, expected in ((network.state_dict(), weights), (ema.tensors, average)):
        found = torch.cat([found["0.weight"], found["1.weight"]])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(row["images"] for row in rows)]) / 8
    assert steps @ [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """Ten steps of 100 s, saved when more than 5 minutes have passed; the seconds of all tries."""
    clock, saved, write = [0.0], [], checkpoint.save_tensors
    monkeypatch.setattr("ddb_fast.engine.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def save(path, tensors, about):
        saved.append((about["step"], about["seconds"]))
        write(path, tensors, about)

    monkeypatch.setattr("ddb_fast.checkpoint.save_tensors", save)

    def go(until=math.inf):
        def loss_of(model, index):
            if clock[0] == until:
                raise KeyboardInterrupt
            clock[0] += 100
            return model(torch.ones(len(index), 1)).square().mean()

        return plain_fit(nn.Linear(1, 1), loss_of, tmp_path, images=80, batch_size=8)

    assert go() == 1000 and saved == [(4, 400), (8, 800)]
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        go(until=1500)
    assert go() == 400 + 600 and saved[2:] == [(4, 400), (8, 800)]


def test_every_step_seed_stage_and_rank_draws_its_own(tmp_path):
    """And each rank has its own half of every batch, in order."""

    class Rank(Accelerator):
        num_processes, process_index = 2, 0

        def gather(self, tensor):
            return tensor

    drawn, taken = [], {}
    for rank, seed, stage in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        accelerator = Rank(cpu=True)
        accelerator.process_index = rank
        shares = taken.setdefault((rank, seed, stage), [])

        def loss_of(model, index, shares=shares):
            drawn.append(torch.randint(2**62, ()).item())
            shares.append(index)
            return model(torch.ones(len(index), 1)).square().mean()

        options = {"seed": seed, "stage": stage, "accelerator": accelerator}
        plain_fit(
            nn.Linear(1, 1), loss_of, tmp_path, images=36, batch_size=12, accumulate=2, **options
        )
    # A step's two parts draw one after the other.
    assert len(drawn) == len(set(drawn)) == 4 * 3 * 2
    sampler = ShuffledSampler(20, seed=3)
    for step in range(3):
        parts = [taken[rank, 0, "a"][2 * step + part] for rank in (0, 1) for part in (0, 1)]
        assert torch.equal(torch.cat(parts), sampler.batch(step, 12))


class Looks:
    """Figures prepared for each look, and the weights that were looked at."""

    def __init__(self, figures):
        self.figures, self.seen = list(figures), []

    def __call__(self, network):
        assert not network.training
        self.seen.append({k: t.clone() for k, t in network.state_dict().items()})
        return {"accuracy": self.figures.pop(0), "other": -1.0}


def test_the_weights_of_the_best_look_are_kept(tmp_path):
    nan = math.nan
    looks = Looks([0.2, nan, 0.7, 0.7, 0.5])
    selection = Selection(looks, by="accuracy", times=5)
    state, *_, taken = train(tmp_path, "a", selection=selection)
    assert [row["images"] for row in selection.curve] == [48, 96, 144, 192, 240]
    assert [row["other"] for row in selection.curve] == [-1.0] * 5
    assert selection.images == 192, "the last of equals"
    assert len(taken) == 30, "looking ends nothing early"
    for name, tensor in state.items():
        assert torch.equal(tensor, looks.seen[3][name]), name
    plain, *_ = train(tmp_path, "b")
    for name, tensor in plain.items():
        assert torch.equal(tensor, looks.seen[4][name]), "looking changes no step"


@pytest.fixture
def fresh_accelerator():
    """A process has one state of accelerate, whose precision the first Accelerator decides."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_looks_are_in_full_precision_as_results_are(tmp_path):
    """Under bf16 autocast a look computes what the network does once training is over."""
    torch.manual_seed(0)
    x, network = torch.randn(32, 16), nn.Linear(16, 1)
    seen = []

    def score(looked_at):
        seen.append(looked_at(x).detach())
        return {"accuracy": 1.0}

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    fit(
        accelerator,
        network,
        lambda model, index: model(x[index]).square().mean(),
        config=Optimisation(images=32, batch_size=16, lr=0.1),
        sampler=ShuffledSampler(32, seed=0),
        stage="test",
        seed=0,
        log=RunLog(accelerator, None),
        checkpoints=Checkpoints(path=tmp_path / "state.safetensors"),
        selection=Selection(score, by="accuracy", times=1),
        show_progress=False,
    )
    assert torch.equal(seen[0], network(x)), "the last look is of the last weights"


def test_no_figure_at_all_keeps_the_last_weights(tmp_path):
    looks = Looks([math.nan] * 3)
    selection = Selection(looks, by="accuracy", times=3)
    state, *_ = train(tmp_path, "a", selection=selection)
    assert selection.images is None
    assert all(torch.equal(tensor, looks.seen[-1][name]) for name, tensor in state.items())


def test_an_interrupted_selection_keeps_what_it_had_seen(tmp_path):
    figures = [0.1, 0.9, 0.3, 0.2, 0.4]
    straight = Selection(Looks(figures), by="accuracy", times=5)
    expected, *_ = train(tmp_path, "a", selection=straight)
    first = Selection(Looks(figures), by="accuracy", times=5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "b", stop_after=17, every=40, selection=first)
    rest = Selection(Looks(figures[2:]), by="accuracy", times=5)
    state, *_ = train(tmp_path, "b", every=40, selection=rest)
    assert rest.curve == straight.curve and rest.images == 96
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_every_epoch_shows_every_sample_once(tmp_path):
    *_, taken = train(tmp_path, "a")
    stream = torch.cat(taken)
    assert sorted(stream[:50].tolist()) == list(range(50))
    assert sorted(stream[50:100].tolist()) == list(range(50))


def test_accumulation_equals_the_whole_batch(tmp_path):
    """On a mean loss without batch norm, dropout or noise, parts sum to the whole."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randn(32, 1)

    def run(parts):
        torch.manual_seed(0)
        network = nn.Linear(4, 1)
        accelerator = Accelerator(cpu=True)
        fit(
            accelerator,
            network,
            lambda model, index: (model(x[index]) - y[index]).square().mean(),
            config=Optimisation(images=64, batch_size=16, lr=0.1, accumulate=parts),
            sampler=ShuffledSampler(32, seed=0),
            stage="test",
            seed=0,
            log=RunLog(accelerator, None),
            checkpoints=Checkpoints(path=tmp_path / f"{parts}.safetensors"),
            show_progress=False,
        )
        return network.weight

    torch.testing.assert_close(run(4), run(1), rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_divided_is_named(tmp_path):
    config = Optimisation(images=64, batch_size=10, accumulate=4)
    with pytest.raises(ValueError, match="batch_size 10 is not a multiple of 1 devices x 4"):
        train(tmp_path, "a", optimisation=config)


def test_a_checkpoint_of_another_network_is_one_line(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "a", stop_after=10, every=8)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="a checkpoint of another shape"):
        fit(
            accelerator,
            nn.Linear(6, 1),
            lambda model, index: model(torch.zeros(len(index), 6)).mean(),
            config=Optimisation(images=240, batch_size=8),
            sampler=ShuffledSampler(50, seed=3),
            stage="test",
            seed=5,
            log=RunLog(accelerator, None),
            checkpoints=Checkpoints(path=tmp_path / "a" / "state.safetensors"),
            show_progress=False,
        )


def test_processes_that_see_other_files_end_with_one_line(tmp_path, monkeypatch):
    """A rank with an older view of the disk would take other steps, and all would wait."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "a", stop_after=10, every=8)
    seen = []
    monkeypatch.setattr("ddb_fast.engine.agree", lambda *words: seen.append(words[1:]))
    train(tmp_path, "a", stop_at=80)
    assert seen == [(10, str(tmp_path / "a" / "state.safetensors"))]

    def ranks(gather, count=2):
        return SimpleNamespace(num_processes=count, device=torch.device("cpu"), gather=gather)

    agree(ranks(None, count=1), 3, "x")
    agree(ranks(lambda number: number.repeat(2)), 3, "x")
    with pytest.raises(ValueError, match="x: not the same for every process"):
        agree(ranks(lambda number: torch.cat([number, number + 1])), 3, "x")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(FloatingPointError, match="the loss is nan after 8 images"):
        fit(
            accelerator,
            nn.Linear(1, 1),
            lambda model, index: model(torch.full((len(index), 1), math.nan)).mean(),
            config=Optimisation(images=8, batch_size=8),
            sampler=ShuffledSampler(50, seed=3),
            stage="test",
            seed=5,
            log=RunLog(accelerator, None),
            checkpoints=Checkpoints(path=tmp_path / "state.safetensors"),
            show_progress=False,
        )


def test_optimizers_are_the_configured_ones():
    parameter = [nn.Parameter(torch.zeros(2))]
    sgd = build_optimizer(Optimisation(images=1, batch_size=1, optimizer="sgd", lr=0.2), parameter)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9
    adam = build_optimizer(Optimisation(images=1, batch_size=1, weight_decay=0.3), parameter)
    assert isinstance(adam, torch.optim.AdamW) and adam.defaults["weight_decay"] == 0.3
