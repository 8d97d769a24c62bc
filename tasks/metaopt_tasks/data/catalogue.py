"""Which data sources there are, and under what licence. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from metaopt.hookspecs import Spec

_UCI = "CC BY 4.0 (UCI Machine Learning Repository)"
_PSF = "PSF-2.0"
_MADE = "made by this package (Apache-2.0)"


def _source(
    name: str, factory: str, summary: str, license: str, paper: str = "", extra: str = "", **defaults: object
) -> Spec:
    return Spec(
        name,
        f"metaopt_tasks.data.{factory}",
        summary,
        paper=paper,
        extra=extra,
        defaults=defaults,
        facts={"license": license},
    )


def _text(name: str, factory: str, summary: str, **defaults: object) -> Spec:
    spec = _source(name, factory, f"{summary}; differs between Python versions", _PSF, **defaults)  # type: ignore[arg-type]
    return replace(spec, facts={**spec.facts, "varies": "with the Python version"})


SOURCES: tuple[Spec, ...] = (
    _source(
        "digits", "tabular:digits", "1,797 handwritten digits, 8x8, from scikit-learn", _UCI,
        "Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49",
    ),
    _source("iris", "tabular:iris", "150 flowers of 3 species, from scikit-learn", _UCI, "Fisher, 1936"),
    _source("wine", "tabular:wine", "178 wines of 3 cultivars, from scikit-learn", _UCI, "Aeberhard and Forina, 1992"),
    _source(
        "breast_cancer", "tabular:breast_cancer", "569 tumours, malignant or benign, from scikit-learn", _UCI,
        "Wolberg et al., 1993",
    ),
    _source(
        "diabetes", "tabular:diabetes", "442 patients' progression after a year, from scikit-learn",
        "no restriction known; published with the paper", "Efron et al., 2004",
    ),
    *(
        _source(
            f"textures{size}", "images:textures", f"grey {size}x{size} patches of six pictures in scikit-image",
            "CC0, public domain, or no known restriction (coins); scikit-image's notes", extra="images", size=size,
        )
        for size in (8, 16)
    ),
    _source(
        "textures32", "images:held_out_textures", "grey 32x32 patches of five other pictures in scikit-image",
        "CC0, public domain, or no known restriction (ihc); scikit-image's notes", extra="images",
    ),
    *(
        _source(
            f"photos{size}", "images:photos", f"colour {size}x{size} patches of photographs in scikit-image and -learn",
            "CC0 and public domain; china and flower CC BY 2.0 (danielbuechele, vultilion)", extra="images", size=size,
        )
        for size in (8, 16, 32)
    ),
    _source(
        "faces", "images:faces", "100 faces and 100 backgrounds, grey, 25x25, in scikit-image",
        "not stated by scikit-image; from Labeled Faces in the Wild, published for research", "Huang et al., 2012",
        extra="images",
    ),
    *(
        _source(f"shapes{size}", "images:shapes", f"six noisy drawn shapes, {size}x{size}", _MADE, size=size)
        for size in (8, 16)
    ),
    _source(
        "mnist1d", "mnist1d:mnist1d", "5,000 one-dimensional digits of length 40", _MADE,
        "Greydanus and Kobak, 2020, arXiv:2011.14439",
    ),
    _source("mixtures", "synthetic:mixtures", "5 classes, each of two Gaussians in 8 dimensions", _MADE),
    *(
        _source(
            f"mixtures_{dims}d", "synthetic:mixtures", f"{classes} classes, each of two Gaussians in {dims} dimensions", _MADE,
            dims=dims, classes=classes, seed=dims,
        )
        for dims, classes in ((2, 5), (16, 10), (64, 10))
    ),
    _source("spirals", "synthetic:spirals", "three spiral arms in the plane", _MADE),
    _source("rings", "synthetic:rings", "three concentric circles in the plane", _MADE),
    _source("teacher", "synthetic:teacher", "what a random network of width 8 says of 16 numbers", _MADE),
    *(
        _source(
            f"teacher_{dims}d", "synthetic:teacher", f"what a random network of width {width} says of {dims} numbers", _MADE,
            dims=dims, width=width, outputs=outputs, seed=dims,
        )
        for dims, width, outputs in ((2, 16, 1), (4, 8, 1), (8, 8, 1), (32, 16, 4), (64, 32, 1))
    ),
    _source(
        "torchvision", "adapters:torchvision", "a data set of torchvision, by name", "the data set's own", extra="torchvision",
    ),
    _source(
        "huggingface", "adapters:huggingface", "a data set of Hugging Face, by name", "the data set's own", extra="huggingface",
    ),
    *(
        _source(f"{shape}2d", "densities:density", f"8,000 points in the plane: {summary}", _MADE, shape=shape)
        for shape, summary in (
            ("moons", "two half circles"), ("rings", "three circles"), ("pinwheel", "five twisted blades"),
            ("eight_gaussians", "eight Gaussians on a circle"), ("spiral", "two spiral arms"),
            ("checkerboard", "half the squares of a board"), ("swiss_roll", "one spiral arm"),
        )
    ),
    *(
        _source(name, "equations:collocation", f"where to solve {summary}", _MADE, equation=name)
        for name, summary in (
            ("logistic_ode", "logistic growth"), ("oscillator_ode", "a damped harmonic oscillator"),
            ("pendulum_ode", "a pendulum"), ("lotka_volterra_ode", "Lotka and Volterra's predators and prey"),
            ("van_der_pol_ode", "van der Pol's oscillator"), ("poisson_equation", "Poisson's equation on an interval"),
            ("heat_equation", "the heat equation"), ("advection_equation", "the advection equation"),
            ("wave_equation", "the wave equation"), ("laplace_equation", "Laplace's equation on a square"),
            ("burgers_equation", "Burgers' equation"), ("helmholtz_equation", "Helmholtz's equation on a square"),
        )
    ),
    _source("outline_points2d", "clouds:clouds", "2,000 clouds of 24 points on 6 outlines", _MADE, kind="outlines"),
    _source("surface_points3d", "clouds:clouds", "2,000 clouds of 32 points on 6 surfaces", _MADE, kind="surfaces"),
    _source("curve_points3d", "clouds:clouds", "2,000 clouds of 32 points on 6 closed curves", _MADE, kind="curves"),
    *(
        _source(
            f"preferences_{kind}", "preferences:preferences", f"{kind} pairs of 4 answers to questions in 8 dimensions", _MADE,
            kind=kind, seed=seed,
        )
        for seed, kind in enumerate(("clean", "noisy", "shuffled"))
    ),
    _source(
        "preferences_bradley_terry", "preferences:preferences",
        "pairs of 4 answers to questions in 8 dimensions, ranked at random by reward", _MADE, kind="bradley_terry", seed=6,
    ),
    *(
        _source(
            f"preferences_curved_{kind}", "preferences:preferences",
            f"{kind} pairs of 6 answers to questions in 12 dimensions, by a non-linear reward", _MADE,
            features=12, actions=6, reward="curved", kind=kind, seed=seed,
        )
        for seed, kind in enumerate(("noisy", "shuffled"), start=3)
    ),
    _source(
        "preferences_many_answers", "preferences:preferences", "noisy pairs of 64 answers to questions in 64 dimensions", _MADE,
        features=64, actions=64, reward="curved", kind="noisy", examples=20_000, seed=5,
    ),
    _text("pydoc_text", "text:pydoc_text", "Python's documentation in 64 characters"),
    _text("pydoc_bytes", "text:pydoc_text", "Python's documentation in bytes", level="bytes"),
    _text("python_source", "text:python_source", "Python's standard library in bytes"),
    _text("python_chars", "text:python_source", "Python's standard library in 64 characters", level="chars"),
    _source("dyck", "sequences:dyck", "balanced brackets of 2 kinds", _MADE),
    _source("dyck3", "sequences:dyck", "balanced brackets of 3 kinds", _MADE, kinds=3, seed=3),
    _source(
        "copy_sequences", "sequences:copy_sequences", "8 symbols to be repeated", _MADE, "Graves et al., 2014, arXiv:1410.5401"
    ),
    _source("recall", "sequences:recall", "values to be told by their keys", _MADE, "Ba et al., 2016, arXiv:1610.06258"),
    _source("modular_addition", "sequences:modular_addition", "a + b mod 31", _MADE, "Power et al., 2022, arXiv:2201.02177"),
    *(
        _source(f"{name}_episodes", "episodes:curve_episodes", f"2,400 {summary}, 10 points to learn each", _MADE, curve=name)
        for name, summary in (("sine", "sine waves"), ("triangle", "triangle waves"))
    ),
    _source("bump_episodes", "episodes:curve_episodes", "2,400 pairs of bumps, 10 points to learn each", _MADE, curve="bumps"),
    *(
        _source(
            f"digits_5way_{shots}shot", "episodes:class_episodes", f"5 of the digits, {shots} of each to learn from", _UCI,
            "Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49", source="digits", shots=shots,
        )
        for shots in (1, 5)
    ),
    _source(
        "mixture_episodes", "episodes:class_episodes", "3 of 5 Gaussian mixtures, 5 examples of each to learn from", _MADE,
        source="mixtures", ways=3, shots=5,
    ),
    _source(
        "photos8_3way_1shot", "episodes:class_episodes", "3 photographs, one 8x8 patch of each to learn from",
        "CC0 and public domain; china and flower CC BY 2.0 (danielbuechele, vultilion)", extra="images",
        source="photos8", ways=3, queries=5,
    ),
    _source("sparse_regression", "regression:sparse_regression", "10 of 100 columns tell the target", _MADE),
    _source(
        "sparse_regression_correlated", "regression:sparse_regression", "8 of 60 columns tell the target; neighbours are alike",
        _MADE, features=60, informative=8, correlation=0.9, seed=1,
    ),
    _source(
        "sparse_regression_2000", "regression:sparse_regression", "40 of 2,000 columns tell the target", _MADE,
        rows=1500, features=2000, informative=40, seed=2,
    ),
    _source(
        "ill_conditioned_regression", "regression:ill_conditioned_regression",
        "30 columns, nearly dependent, that all tell the target", _MADE,
    ),
    _source(
        "ill_conditioned_classes", "regression:ill_conditioned_classes", "4 classes by 20 columns, nearly dependent", _MADE,
    ),
)  # fmt: skip
