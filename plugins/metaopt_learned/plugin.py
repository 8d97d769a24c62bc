"""What this plugin offers: learned optimizers and the estimators that meta-train them."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_learned_optimizers() -> list[Spec]:
    """Rules with meta-parameters."""
    return [
        Spec(
            "small_fc_lopt", "metaopt_learned.adafac_mlp:AdafacMLP",
            "a tiny MLP on momentum, Adam and Adafactor features of every parameter",
            ("mlp",), "Metz et al., 2022, https://arxiv.org/abs/2203.11860",
        ),
        Spec(
            "mlp_lopt", "metaopt_learned.mlp_lopt:MLPLOpt",
            "an MLP on gradient, parameter and six momenta of every parameter",
            ("mlp",), "Metz et al., 2019, https://arxiv.org/abs/1810.10180",
        ),
        Spec(
            "mlp_nominal", "metaopt_learned.mlp_nominal:MLPNominal",
            "small_fc_lopt on top of an Adam or momentum step whose size it controls",
            ("mlp",), "Metz et al., 2022, https://arxiv.org/abs/2203.11860",
        ),
        Spec(
            "mulo", "metaopt_learned.mulo:MuLO",
            "small_fc_lopt with steps that hold at any width, for models in muP",
            ("mlp", "roles"), "Thérien et al., 2024, https://arxiv.org/abs/2406.00153",
        ),
        Spec(
            "celo2_base", "metaopt_learned.celo2:Celo2Base",
            "a tiny MLP on features of every parameter, its direction normalised per matrix",
            ("mlp",), "Moudgil et al., https://github.com/amoudgl/celo",
        ),
        Spec(
            "celo2", "metaopt_learned.celo2:Celo2",
            "a tiny MLP whose direction is orthogonalised; AdamW on vectors and embeddings",
            ("mlp", "roles"), "Moudgil et al., https://github.com/amoudgl/celo",
        ),
        Spec(
            "orthogonal_mlp", "metaopt_learned.orthogonal_mlp:OrthogonalMLP",
            "celo2's network on every parameter, orthogonalised, with a learned schedule; starts as Adam's direction",
            ("mlp",), "Moudgil et al., https://github.com/amoudgl/celo",
        ),
        Spec(
            "learnable_sgd", "metaopt_learned.hand_designed:LearnedHyperparameters",
            "SGD with a learned learning rate",
            ("hyperparameters",), "Metz et al., 2022, https://arxiv.org/abs/2203.11860", {"rule": "sgd", "learned": "lr"},
        ),
        Spec(
            "learnable_momentum", "metaopt_learned.hand_designed:LearnedHyperparameters",
            "SGD with a learned learning rate and momentum",
            ("hyperparameters",), "Metz et al., 2022, https://arxiv.org/abs/2203.11860",
            {"rule": "momentum", "learned": "lr,momentum"},
        ),
        Spec(
            "learnable_adam", "metaopt_learned.hand_designed:LearnedHyperparameters",
            "Adam with a learned learning rate, decays and eps",
            ("hyperparameters",), "Metz et al., 2022, https://arxiv.org/abs/2203.11860",
            {"rule": "adam", "learned": "lr,betas,eps"},
        ),
        Spec(
            "learned_schedule", "metaopt_learned.hand_designed:LearnedSchedule",
            "any hand-designed rule with learned schedules of its hyperparameters",
            ("hyperparameters",), "Biedenkapp et al., 2020, https://doi.org/10.3233/FAIA200122",
        ),
        Spec(
            "controller", "metaopt_learned.controller:Controller",
            "a policy that watches training and sets the hyperparameters of any hand-designed rule",
            ("hyperparameters", "policy"), "Biedenkapp et al., 2020, https://doi.org/10.3233/FAIA200122",
        ),
        Spec(
            "coordinate_lstm", "metaopt_learned.lstm:CoordinateLSTM",
            "an LSTM on the gradient of every parameter",
            ("recurrent",), "Andrychowicz et al., 2016, https://arxiv.org/abs/1606.04474",
        ),
        Spec(
            "l2o_pa", "metaopt_learned.structured:StructuredL2O",
            "an LSTM that predicts preconditioner and acceleration of a gradient step",
            ("recurrent", "structured"), "Liu et al., 2023, https://arxiv.org/abs/2305.18577",
        ),
        Spec(
            "velo", "metaopt_learned.velo:VeLO",
            "an LSTM for each tensor writes the network that steps the tensor's parameters",
            ("mlp", "recurrent", "hypernetwork"), "Metz et al., 2022, https://arxiv.org/abs/2211.09760",
        ),
        Spec(
            "celo", "metaopt_learned.celo:Celo",
            "one small network for all parameters, and an LSTM that schedules its steps",
            ("mlp", "recurrent"), "Moudgil et al., 2025, https://arxiv.org/abs/2501.12670",
        ),
        Spec(
            "celo_adam", "metaopt_learned.celo:CeloAdam",
            "Adam whose learning rate is scheduled by an LSTM",
            ("recurrent",), "Moudgil et al., 2025, https://arxiv.org/abs/2501.12670",
        ),
        Spec(
            "rnn_mlp_lopt", "metaopt_learned.rnn_mlp:RNNMLP",
            "a network for each parameter and an LSTM for each tensor that write to each other",
            ("mlp", "recurrent"), "Metz et al., 2020, https://arxiv.org/abs/2009.11243",
        ),
        Spec(
            "nn_adam", "metaopt_learned.nn_adam:NNAdam",
            "Adam whose hyperparameters an LSTM moves for each tensor",
            ("recurrent",), "Metz et al., 2020, https://arxiv.org/abs/2009.11243",
        ),
        Spec(
            "residual_mlp", "metaopt_learned.equivariant:ResidualMLP",
            "momentum or Adam, corrected by an MLP on permutation-equivariant features",
            ("mlp", "equivariant"), "Zhou, Finn and Harrison, 2024, https://arxiv.org/abs/2402.05232",
        ),
    ]  # fmt: skip


@hookimpl
def metaopt_importers() -> list[Spec]:
    """Checkpoints of learned_optimization and celo."""
    names = (
        "small_fc_lopt", "mulo", "mlp_lopt", "mlp_nominal", "celo2_base", "celo2", "velo", "celo", "celo_adam",
        "rnn_mlp_lopt", "nn_adam",
    )  # fmt: skip
    factory, summary = "metaopt_learned.import_theta:import_flax", "flax checkpoints of the JAX original"
    return [Spec(name, factory, summary, ("flax",), defaults={"name": name}, extra="import") for name in names]


@hookimpl
def metaopt_estimators() -> list[Spec]:
    """Meta-gradients, by perturbation and by differentiation."""
    return [
        Spec(
            "es", "metaopt_learned.estimators.es:TruncatedES",
            "evolution strategies on truncated unrolls",
            ("black-box", "truncated", "biased"), "Metz et al., 2019, https://arxiv.org/abs/1810.10180",
        ),
        Spec(
            "pes", "metaopt_learned.estimators.pes:PES",
            "persistent evolution strategies: unbiased over truncations",
            ("black-box", "truncated"), "Vicol, Metz and Sohl-Dickstein, 2021, https://arxiv.org/abs/2112.13835",
        ),
        Spec(
            "nres", "metaopt_learned.estimators.nres:NRES",
            "noise-reuse evolution strategies: one perturbation per episode, unbiased over truncations",
            ("black-box", "truncated"), "Li et al., 2023, https://arxiv.org/abs/2304.10153",
        ),
        Spec(
            "full_es", "metaopt_learned.estimators.full_es:FullES",
            "evolution strategies on the mean, lowest, last or recomputed loss of whole episodes",
            ("black-box", "whole"), "Metz et al., 2022, https://arxiv.org/abs/2211.09760",
        ),
        Spec(
            "pes_analytic", "metaopt_learned.estimators.pes_analytic:PESAnalytic",
            "PES with the newest window backpropagated: unbiased, of lower variance per pair",
            ("differentiated", "truncated"), "Vicol, Metz and Sohl-Dickstein, 2021, https://arxiv.org/abs/2112.13835",
        ),
        Spec(
            "full_unroll", "metaopt_learned.estimators.unroll:FullUnroll",
            "backpropagation through whole episodes: exact",
            ("differentiated", "whole"), "Andrychowicz et al., 2016, https://arxiv.org/abs/1606.04474",
        ),
        Spec(
            "truncated_unroll", "metaopt_learned.estimators.unroll:TruncatedUnroll",
            "backpropagation through windows",
            ("differentiated", "truncated", "biased"), "Andrychowicz et al., 2016, https://arxiv.org/abs/1606.04474",
        ),
        Spec(
            "forward_gradient", "metaopt_learned.estimators.forward:ForwardGradient",
            "directional derivatives along random directions, carried forward over windows: unbiased",
            ("differentiated", "truncated"), "Baydin et al., 2022, https://arxiv.org/abs/2202.08587",
        ),
    ]  # fmt: skip
