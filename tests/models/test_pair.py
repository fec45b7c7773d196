"""Two networks in one loop against two loops with an optimiser each."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ddb_fast.config import Optimisation
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.engine import Checkpoints, build_optimizer, fit, learning_rate
from ddb_fast.models.pair import NetworkPair
from ddb_fast.recipes import LfF
from ddb_fast.trackers import RunLog

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


def networks() -> list[nn.Module]:
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_one_loop_trains_them_as_two_would(tmp_path, optimizer, grad_clip):
    config = Optimisation(
        images=96,
        batch_size=8,
        lr=0.02,
        weight_decay=0.1,
        grad_clip=grad_clip,
        optimizer=optimizer,
    )
    sampler, accelerator = ShuffledSampler(24, seed=3), Accelerator(cpu=True)
    biased, debiased = networks()
    pair, recipe = NetworkPair(biased=biased, debiased=debiased), LfF(Y, 3)
    fit(
        accelerator,
        pair,
        lambda model, index: recipe(model(X[index]), Y[index], index),
        config=config,
        sampler=sampler,
        stage="pair",
        seed=0,
        log=RunLog(accelerator, None),
        checkpoints=Checkpoints(path=tmp_path / "state.safetensors"),
        recipe=recipe,
        clipped=(biased, debiased),
        show_progress=False,
    )

    alone, table = networks(), LfF(Y, 3)
    optimizers = [build_optimizer(config, list(network.parameters())) for network in alone]
    for step in range(12):
        index = sampler.batch(step, 8)
        logits = torch.stack([network(X[index]) for network in alone], dim=1)
        table(logits, Y[index], index).backward()
        for network, own in zip(alone, optimizers, strict=True):
            if grad_clip is not None:
                norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
                assert norm > grad_clip, "clipping acts"
            own.param_groups[0]["lr"] = learning_rate(config, step * 8)
            own.step()
            own.zero_grad()
    for network, expected in zip((biased, debiased), alone, strict=True):
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_in_evaluation_the_pair_is_the_debiased_network():
    biased, debiased = networks()
    pair = NetworkPair(biased=biased, debiased=debiased)
    stacked = pair(X)
    assert torch.equal(stacked[:, 0], biased(X)) and torch.equal(stacked[:, 1], debiased(X))
    assert torch.equal(pair.eval()(X), debiased(X))
