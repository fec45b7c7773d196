"""Two ranks in DistributedDataParallel against one process with the double batch.

This file is also the program of a rank: `python test_distributed.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddb_fast.recipes import ERM, GroupDRO, LfF, ReweightedLoss

STEPS, WORLD, PER_RANK, N = 10, 2, 6, 40
RECIPES = ("erm", "group_dro", "reweighted", "reweighted_lff", "lff")


def training_set() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (N,), generator=generator)
    groups = y * 2 + (torch.rand(N, generator=generator) < 0.3)
    # Sorted by group, so that the two halves of a contiguous batch hold different groups; random
    # batches repeat samples, also across ranks.
    order = groups.argsort(stable=True)
    size = WORLD * PER_RANK
    contiguous = [(torch.arange(size) + 7 * step) % N for step in range(STEPS // 2)]
    random = [torch.randint(N, (size,), generator=generator) for _ in range(STEPS - STEPS // 2)]
    return {
        "x": torch.randn(N, 5, generator=generator, dtype=torch.float64),
        "y": y[order],
        "groups": groups[order],
        "amplifier_loss": 3 * torch.rand(N, generator=generator),
        "index": torch.stack(
            [batch for pair in zip(contiguous, random, strict=True) for batch in pair]
        ),
    }


def make_recipe(name: str, data: dict[str, Tensor]) -> nn.Module:
    if name == "erm":
        return ERM()
    if name == "group_dro":
        return GroupDRO(data["groups"], 6, step_size=0.5, adjustment=0.7).double()
    if name == "lff":
        return LfF(data["y"], 3).double()
    lff = {"moving_average": 0.7, "class_maximum": True} if name == "reweighted_lff" else {}
    return ReweightedLoss(data["amplifier_loss"], data["y"], **lff).double()


def train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Ten SGD steps; the loss, the gradients and the recipe's state after each of them."""
    data = training_set()
    recipe = make_recipe(name, data)
    torch.manual_seed(1)
    outputs = [nn.Linear(8, 6), nn.Unflatten(1, (2, 3))] if name == "lff" else [nn.Linear(8, 3)]
    model = nn.Sequential(nn.Linear(5, 8), *outputs).double()
    parameters = list(model.parameters())
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    trace = {}
    for step, batch in enumerate(data["index"]):
        index = batch.chunk(world)[rank]
        loss = recipe(model(data["x"][index]), data["y"][index], index)
        optimizer.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        trace |= {f"{step}/loss": loss.detach(), f"{step}/gradient": gradient}
        trace |= {f"{step}/{key}": value.clone() for key, value in recipe.state_dict().items()}
        optimizer.step()
    return trace


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD
    )
    traces = {f"{name}/{k}": v for name in RECIPES for k, v in train(name, rank, WORLD).items()}
    save_file(traces, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(WORLD)]


def test_the_batches_are_hard_cases():
    data = training_set()
    only_on_one_rank = absent = repeated = 0
    for batch in data["index"]:
        images = [set(part.tolist()) for part in batch.chunk(WORLD)]
        groups = [set(data["groups"][part].tolist()) for part in batch.chunk(WORLD)]
        only_on_one_rank += groups[0] != groups[1]
        absent += len(groups[0] | groups[1]) < 6
        repeated += not images[0].isdisjoint(images[1])
    assert min(only_on_one_rank, absent, repeated) >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_equal_one_with_the_double_batch(ranks, name):
    alone = train(name, rank=0, world=1)
    traces = [
        {k.removeprefix(f"{name}/"): v for k, v in rank.items() if k.startswith(f"{name}/")}
        for rank in ranks
    ]
    for key, expected in alone.items():
        found = [trace.pop(key) for trace in traces]
        if key.endswith("/loss"):
            # Ranks return their share; only its mean is the loss of the batch.
            found = [torch.stack(found).mean()]
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    assert traces == [{}, {}]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
