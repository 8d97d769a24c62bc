"""The bilevel problems, by name."""

from __future__ import annotations

from metaopt.hookspecs import Spec

_PLACE = "metaopt_tasks.problems"

PROBLEMS = (
    Spec(
        "hyper_cleaning", f"{_PLACE}.cleaning:HyperCleaning", "find examples with wrong labels by a weight for each",
        ("data",), "Franceschi et al., 2017, https://arxiv.org/abs/1703.01785",
    ),
    Spec(
        "sample_selection", f"{_PLACE}.cleaning:SampleSelection", "the fifth of the examples that is best to train on",
        ("data",),
    ),
    Spec(
        "layer_decay", f"{_PLACE}.regularisation:WeightDecay", "an L2 penalty for each tensor of a perceptron",
        ("regularisation",), "Lorraine et al., 2020, https://arxiv.org/abs/1911.02590",
    ),
    Spec(
        "parameter_decay", f"{_PLACE}.regularisation:WeightDecay", "an L2 penalty for each weight of a perceptron",
        ("regularisation",), "Lorraine et al., 2020, https://arxiv.org/abs/1911.02590", {"per": "parameter"},
    ),
    Spec(
        "scalar_decay", f"{_PLACE}.regularisation:WeightDecay", "one L2 penalty for a whole perceptron: a control",
        ("regularisation", "control"), "", {"per": "all"},
    ),
    Spec(
        "ridge", f"{_PLACE}.regularisation:Ridge", "a penalty for each coefficient of a regression, solved in closed form",
        ("regularisation", "closed form"),
    ),
    Spec(
        "loss_weighting", f"{_PLACE}.regularisation:LossWeighting", "class weights and label smoothing for rare classes",
        ("data",),
    ),
    Spec(
        "learned_augmentation", f"{_PLACE}.regularisation:LearnedAugmentation", "how much to distort 100 images",
        ("data", "stochastic"), "Lorraine et al., 2020, https://arxiv.org/abs/1911.02590",
    ),
    Spec(
        "quadratic_schedule", f"{_PLACE}.schedules:QuadraticSchedule", "step sizes on a quadratic: Chebyshev's are the best",
        ("schedule", "closed form"),
    ),
    Spec(
        "task_schedule", f"{_PLACE}.schedules:TaskSchedule", "the learning-rate schedule of a registered task",
        ("schedule", "stochastic"), "Engstrom et al., 2025, https://arxiv.org/abs/2503.13751",
    ),
    Spec(
        "maml_sine", f"{_PLACE}.maml:MamlSine", "initial parameters that learn a sine from 5 points in one step",
        ("initialisation", "stochastic"), "Finn et al., 2017, https://arxiv.org/abs/1703.03400",
    ),
    Spec(
        "toy_cell", f"{_PLACE}.cell:ToyCell", "the operations of a cell of three edges, which can be enumerated",
        ("architecture",), "Liu et al., 2019, https://arxiv.org/abs/1806.09055",
    ),
    Spec(
        "data_distillation", f"{_PLACE}.distillation:DataDistillation", "one learned image of each class to train on",
        ("data",), "Wang et al., 2018, https://arxiv.org/abs/1811.10959",
    ),
    Spec(
        "one_point", f"{_PLACE}.distillation:OnePoint", "where warm and cold starts differ: one example, very many weights",
        ("data", "closed form"), "Vicol et al., 2022, https://arxiv.org/abs/2212.14032",
    ),
)  # fmt: skip
