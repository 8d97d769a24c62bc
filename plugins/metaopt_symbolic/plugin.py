"""What this plugin offers: a search over programs, and its sources of candidates."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_proposers() -> list[Spec]:
    """One spec for each name that a user may type."""
    paper = "Chen et al., 2023, https://arxiv.org/abs/2302.06675"
    place = "metaopt_symbolic.searchers"
    return [
        Spec("evolution", f"{place}:Evolution", "aging evolution of programs", ("rule",), paper),
        Spec(
            "effective", f"{place}:Evolution",
            "evolution under more pressure, with restarts, by mutations more of which have an effect", ("rule",),
            "Brameier and Banzhaf, 2007, Linear Genetic Programming", {
                "population": 500, "tournament": 8, "patience": 8000, "parsimony": 5e-4,
                "mutation": {
                    "tune": 0.5, "splice": 0.5, "duplicate": 0.3, "scales": (1.0, 0.1, 0.01), "complement": 0.5
                },
            },
        ),
        Spec("islands", f"{place}:Islands", "several populations, the best of each joining the next", ("rule",), paper),
        Spec(
            "constants", f"{place}:Evolution", "aging evolution of the start's numbers only: a control",
            ("rule", "control"), paper, {"mutation": {"insert": 0, "delete": 0, "modify": 0, "tune": 1}},
        ),
        Spec("random", f"{place}:RandomSearch", "the start, mutated at random: a control", ("rule", "control"), paper),
        Spec(
            "policy", f"{place}:Policy", "evolution whose new statements are drawn from a learned distribution",
            ("rule",), "Baluja, 1994, CMU-CS-94-163",
        ),
        Spec(
            "trees", "metaopt_symbolic.trees:Trees", "aging evolution of small expression trees over moments, from scratch",
            ("rule",), "Bello et al., 2017, https://arxiv.org/abs/1709.07417",
        ),
        Spec(
            "mutator", "metaopt_symbolic.proposals.registered:mutator",
            "mutates losses and rules that were found, without a language model", ("text",), paper,
        ),
    ]  # fmt: skip


@hookimpl
def metaopt_commands() -> list[Spec]:
    """The search on the command line."""
    return [
        Spec("discover", "metaopt_symbolic.commands:discover", "search for optimizers and losses"),
        Spec("show", "metaopt_symbolic.proposals.commands:show", "a candidate of a search by proposers"),
        Spec(
            "distill", "metaopt_symbolic.distill.commands:distill", "a learned objective or optimizer as a closed form"
        ),
        Spec("simplify", "metaopt_symbolic.commands:simplify", "the champion of a search as ten lines"),
    ]
