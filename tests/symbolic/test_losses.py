"""Losses as programs of the search language: the same genomes, analysis, mutation and fingerprint as optimizers."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from metaopt import registry
from metaopt.objective import faults
from metaopt.program import OPS, Program, ProgramObjective, evaluate
from metaopt.program.source import function_source
from metaopt_symbolic.analysis import analyse, without_redundant
from metaopt_symbolic.fingerprint import Fingerprints, fingerprint
from metaopt_symbolic.genome import LOSS_SEEDS, SEEDS, Genome, GenomeError, from_json, from_objective, parse
from metaopt_symbolic.language import FUNCTIONS
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes

RHO = torch.linspace(-40, 40, 81, dtype=torch.float64)


def of(*texts: str) -> Fingerprints:
    return fingerprint([parse(text).program() for text in texts])


def run(genome: Genome) -> torch.Tensor:
    return evaluate(genome.program(), {"rho": RHO}, {})[0]


def one_line(expression: str) -> str:
    return f"def loss(rho):\n    loss = {expression}\n    return loss\n"


def objective(name: str) -> torch.Tensor:
    made = registry.create("objective", name, beta=0.05)
    return made({"rho": RHO})


@pytest.mark.parametrize("name", LOSS_SEEDS)
def test_seeds_are_the_registered_objectives(name: str) -> None:
    genome = parse(LOSS_SEEDS[name])
    assert genome.is_loss and genome.tensors == ("rho",) and genome.slots == ()
    torch.testing.assert_close(run(genome), objective(name), rtol=1e-12, atol=1e-15)
    assert faults(ProgramObjective(genome.program())) == []


@pytest.mark.parametrize("name", ["dpo", "lrml", "exponential", "pfl", "cpo", "huber", "ppo_clip"])
def test_every_traced_objective_is_a_genome_and_comes_back(name: str) -> None:
    made = registry.create("objective", name)
    genome = from_objective(made)
    assert parse(genome.text()) == genome and from_json(json.loads(json.dumps(genome.to_json()))) == genome
    inputs = {key: torch.linspace(0.5, 3, 20).double() * (k - 1.5) for k, key in enumerate(made.inputs)}
    same = ProgramObjective(genome.program(), of=made.kind)
    torch.testing.assert_close(same(inputs), made(inputs), rtol=1e-12, atol=1e-14)
    assert not same.batch_dependent


def test_printed_source_computes_the_loss() -> None:
    program = parse(LOSS_SEEDS["lrml"]).program(named=True)
    namespace: dict[str, object] = {"torch": torch}
    exec(function_source(program, "loss"), namespace)
    torch.testing.assert_close(namespace["loss"](RHO), objective("lrml"), rtol=1e-12, atol=1e-15)  # type: ignore[operator]


def test_analysis_finds_what_a_loss_does_not_need() -> None:
    text = LOSS_SEEDS["dpo"].replace("    likelihood", "    waste = exp(z)\n    z = mul(z, 1.0)\n    likelihood")
    genomes = Genomes.of([parse(text), parse(LOSS_SEEDS["dpo"]), parse(LOSS_SEEDS["slic"])])
    found = analyse(genomes)
    assert found.valid.all()
    assert found.live[0, :5].tolist() == [True, False, True, True, True]
    assert len(set(found.hashes.tolist())) == 3
    assert "waste" not in without_redundant(parse(text)).text()
    assert without_redundant(parse(text)).is_loss


def test_fingerprints_are_of_the_slopes() -> None:
    dpo = LOSS_SEEDS["dpo"]
    shifted = dpo.replace("    return", "    loss = add(loss, 3.0)\n    return")
    other_way = one_line("relu(rho)").replace("    loss = relu(rho)", "    z = mul(rho, 0.05)\n    z = negative(z)\n"
                                                "    e = exp(z)\n    loss = log1p(e)")  # fmt: skip
    hashes = of(dpo, shifted, other_way, LOSS_SEEDS["slic"], dpo.replace("0.05", "0.0501")).hashes
    assert (hashes[0] == hashes[1]).all(), "a constant changes no training"
    assert (hashes[0] == hashes[2]).all(), "-log sigmoid(z) = log(1 + e^-z)"
    assert (hashes[0] != hashes[3]).all() and (hashes[0] != hashes[4]).all()


def test_fingerprints_tell_losses_without_slope_and_those_that_are_no_numbers() -> None:
    found = of(one_line("sign(rho)"), one_line("arcsin(rho)"), one_line("negative(rho)"))
    assert found.uses_gradient.tolist() == [False, True, True]
    assert found.finite.tolist() == [True, False, True]


def test_children_of_a_loss_are_losses() -> None:
    rng, mutation = np.random.default_rng(0), Mutation(functions=tuple(FUNCTIONS))
    genomes = Genomes.of([parse(LOSS_SEEDS["lrml"])] * 200)
    for _ in range(5):
        genomes = mutation.children(genomes, rng)
    children: Sequence[Genome] = [genomes[k] for k in range(len(genomes))]
    programs = [child.program() for child in children]
    assert all(child.is_loss for child in children)
    assert len({child.digest for child in children}) > 150
    assert len(np.unique(fingerprint(programs).hashes[:, 0])) > 60
    reduces = [p for p in programs if p.reach != "element"]
    assert reduces and all(ProgramObjective(p).batch_dependent for p in reduces)


def test_a_loss_has_one_output_for_each_example() -> None:
    with pytest.raises(GenomeError, match="must depend on a tensor"):
        parse(one_line("get_pi()")).program()
    with pytest.raises(ValueError, match="has 1 outputs, got 2"):
        Program(("beta",), ("rho",), (), ("rho", "rho"))
    with pytest.raises(ValueError, match=r"reads policy_chosen_logps, .*, the program 'param' too"):
        ProgramObjective(parse(SEEDS["lion"]).program())
    with pytest.raises(ValueError, match="they lack beta"):
        ProgramObjective(parse("def loss(rho, beta):\n    loss = mul(rho, beta)\n    return loss\n").program())


def test_hyperparameters_of_a_loss_are_its_scalars() -> None:
    genome = parse("def loss(rho, beta):\n    loss = mul(rho, beta)\n    return loss\n")
    assert genome.scalars == ("beta",)
    loss = ProgramObjective(genome.program(), numbers=(("beta", 2.0),))
    assert loss({"rho": RHO})[-1].item() == 80.0
    assert loss({"rho": RHO}, {"beta": torch.tensor(3.0)})[-1].item() == 120.0
    assert set(OPS) >= {s.op for s in loss.program.statements}
