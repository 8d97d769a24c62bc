"""What this plugin offers: objectives."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl

_DISCOPOP = "Lu et al., 2024, https://arxiv.org/abs/2406.08414"
_PPO = "Schulman et al., 2017, https://arxiv.org/abs/1707.06347"
_LPO = "Lu et al., 2022, https://arxiv.org/abs/2210.05639"
_F_DPO = "Wang et al., 2023, https://arxiv.org/abs/2309.16240"
_ANY_LOSS = "Han et al., 2024, https://arxiv.org/abs/2405.14745"
_CRAMMER = "Crammer and Singer, 2001, https://jmlr.org/papers/v2/crammer01a.html"
_BATCH = ("batch-dependent",)


@hookimpl
def metaopt_objectives() -> list[Spec]:
    """One spec for each name that a user may type; the first tag is the kind."""
    return [*_preference(), *_classification(), *_regression(), *_reweighting(), *_rl()]


def _preference() -> list[Spec]:
    where, tags = "metaopt_objectives.preference", ("preference",)
    found, discovered = "metaopt_objectives.discovered", ("preference", "discovered")
    return [
        Spec("dpo", f"{where}:DPO", "-log sigmoid(beta rho)", tags, "Rafailov et al., 2023, https://arxiv.org/abs/2305.18290"),
        Spec("ipo", f"{where}:IPO", "(rho - 1 / (2 beta))^2", tags, "Azar et al., 2023, https://arxiv.org/abs/2310.12036"),
        Spec("slic", f"{where}:SLiC", "max(0, 1 - beta rho)", tags, "Zhao et al., 2023, https://arxiv.org/abs/2305.10425"),
        Spec("exponential", f"{where}:Exponential", "exp(-beta rho)", tags, "Tang et al., 2024, https://arxiv.org/abs/2402.05749"),
        Spec("kto_pair", f"{where}:KTOPair", "each answer against the batch's KL divergence", tags + _BATCH,
             "Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306"),
        Spec("orpo", f"{where}:ORPO", "imitation and the ratio of odds; no reference", tags,
             "Hong et al., 2024, https://arxiv.org/abs/2403.07691"),
        Spec("bco", f"{where}:BCO", "each answer against the batch's mean reward", tags + _BATCH,
             "Jung et al., 2024, https://arxiv.org/abs/2404.04656"),
        Spec("odpo", f"{where}:ODPO", "DPO with a margin that grows with the scores' gap", tags,
             "Amini et al., 2024, https://arxiv.org/abs/2402.10571"),
        Spec("dpo_shift", f"{where}:DPOShift", "DPO in which the rejected answer counts less", tags,
             "Yang et al., 2025, https://arxiv.org/abs/2502.07599"),
        Spec("ln_dpo", f"{where}:LengthNormalizedDPO", "DPO per token", tags, "Ahrabian et al., 2024, https://arxiv.org/abs/2407.15229"),
        Spec("rpo", f"{where}:RPO", "DPO and imitation: regularised", tags, "Liu et al., 2024, https://arxiv.org/abs/2405.16436"),
        Spec("pmpo", f"{where}:PMPO", "linear in the log-probabilities, with a KL penalty", tags,
             "Abdolmaleki et al., 2024, https://arxiv.org/abs/2410.04166"),
        Spec("f_dpo_js", f"{where}:FDivergenceDPO", "DPO of the Jensen-Shannon divergence", tags, _F_DPO),
        Spec("f_dpo_alpha", f"{where}:FDivergenceDPO", "DPO of an alpha-divergence", tags, _F_DPO, {"divergence": "alpha"}),
        Spec("f_dpo_forward_kl", f"{where}:FDivergenceDPO", "DPO of KL(ref || pi)", tags, _F_DPO, {"divergence": "forward_kl"}),
        Spec("simpo", f"{where}:SimPO", "per token, with a margin; no reference", tags,
             "Meng et al., 2024, https://arxiv.org/abs/2405.14734"),
        Spec("cpo", f"{where}:CPO", "contrast and imitation; no reference", tags, "Xu et al., 2024, https://arxiv.org/abs/2401.08417"),
        Spec("lrml", f"{found}:LogRatioModulated", "DiscoPOP's mix of dpo and exponential", discovered, _DISCOPOP),
        Spec("padll", f"{found}:PADLL", "dpo, halved below 0", discovered, _DISCOPOP),
        Spec("cell", f"{found}:CELL", "mean of dpo and exponential", discovered, _DISCOPOP),
        Spec("aql", f"{found}:AQL", "dpo and slic, mixed around the batch's mean", discovered + _BATCH, _DISCOPOP),
        Spec("aqfl", f"{found}:AQFL", "dpo and slic, mixed by the batch's spread", discovered + _BATCH, _DISCOPOP),
        Spec("dbaql", f"{found}:DBAQL", "dpo and exponential, mixed by the batch's variance", discovered + _BATCH, _DISCOPOP),
        Spec("pfl", f"{found}:PFL", "dpo where the policy is right already, else slic", discovered, _DISCOPOP),
    ]  # fmt: skip


def _classification() -> list[Spec]:
    where, tags = "metaopt_objectives.classification", ("classification",)
    return [
        Spec("cross_entropy", f"{where}:CrossEntropy", "-log p", tags),
        Spec("label_smoothing", f"{where}:CrossEntropy", "cross-entropy with labels smoothed by 0.1", tags,
             "Szegedy et al., 2016, https://arxiv.org/abs/1512.00567", {"smoothing": 0.1}),
        Spec("focal", f"{where}:Focal", "-(1 - p)^gamma log p", tags, "Lin et al., 2017, https://arxiv.org/abs/1708.02002"),
        Spec("polyloss", f"{where}:PolyLoss", "-log p + epsilon (1 - p)", tags, "Leng et al., 2022, https://arxiv.org/abs/2204.12511"),
        Spec("hinge", f"{where}:Hinge", "max(0, 1 - m)", tags, _CRAMMER),
        Spec("squared_hinge", f"{where}:Hinge", "max(0, 1 - m)^2", tags, _CRAMMER, {"power": 2}),
        Spec("summed_hinge", f"{where}:SummedHinge", "a hinge for each other class", tags, "Weston and Watkins, 1999, ESANN"),
        Spec("smooth_hinge", f"{where}:SmoothHinge", "a hinge with a round corner", tags, "Rennie and Srebro, 2005, IJCAI"),
        Spec("calibrated_ensemble", f"{where}:CalibratedEnsemble", "weighted mean of four convex losses of the margin", tags,
             "Dai, 2024, https://arxiv.org/abs/2409.00956"),
        Spec("soft_f1", f"{where}:MetricLoss", "1 - the batch's soft F1", tags + _BATCH, _ANY_LOSS),
        Spec("soft_recall", f"{where}:MetricLoss", "1 - the batch's soft balanced accuracy", tags + _BATCH, _ANY_LOSS,
             {"metric": "recall"}),
    ]  # fmt: skip


def _regression() -> list[Spec]:
    where, tags = "metaopt_objectives.regression", ("regression",)
    return [
        Spec("mse", f"{where}:SquaredError", "e^2", tags),
        Spec("mae", f"{where}:AbsoluteError", "|e|", tags),
        Spec("huber", f"{where}:Huber", "squared, then straight", tags, "Huber, 1964, https://doi.org/10.1214/aoms/1177703732"),
        Spec("log_cosh", f"{where}:LogCosh", "log cosh e", tags, "Green, 1990, https://doi.org/10.1109/42.52985"),
        Spec("quantile", f"{where}:Quantile", "the pinball loss", tags, "Koenker and Bassett, 1978, https://doi.org/10.2307/1913643"),
        Spec("cauchy", f"{where}:Cauchy", "log(1 + (e / width)^2 / 2)", tags,
             "Black and Anandan, 1996, https://doi.org/10.1006/cviu.1996.0006"),
    ]  # fmt: skip


def _reweighting() -> list[Spec]:
    where, tags = "metaopt_objectives.reweighting", ("reweighting",)
    return [
        Spec("tilted", f"{where}:Tilted", "B softmax(tilt losses)", tags + _BATCH, "Li et al., 2021, https://arxiv.org/abs/2007.01162"),
        Spec("self_paced", f"{where}:SelfPaced", "max(0, 1 - loss / limit)", tags,
             "Jiang et al., 2014, https://doi.org/10.1145/2647868.2654918"),
        Spec("focal_weights", f"{where}:FocalWeights", "(1 - exp(-loss))^gamma", tags, "Lin et al., 2017, https://arxiv.org/abs/1708.02002"),
        Spec("hardest_share", f"{where}:HardestShare", "the hardest of the batch alone", tags + _BATCH,
             "Fan et al., 2017, https://arxiv.org/abs/1705.08826"),
        Spec("easiest_share", f"{where}:EasiestShare", "the easiest of the batch alone", tags + _BATCH,
             "Han et al., 2018, https://arxiv.org/abs/1804.06872"),
    ]  # fmt: skip


def _rl() -> list[Spec]:
    where, tags = "metaopt_objectives.policy", ("rl",)
    return [
        Spec("importance_sampling", f"{where}:ImportanceSampling", "-r A", tags, "Kakade and Langford, 2002, ICML"),
        Spec("ppo_clip", f"{where}:PPOClip", "-min(r A, clip(r) A)", tags, _PPO),
        Spec("ppo_penalty", f"{where}:PPOPenalty", "-r A + beta (r - 1 - log r)", tags, _PPO),
        Spec("discovered_policy", f"{where}:DiscoveredPolicy", "the drift that LPO learned, in closed form", tags, _LPO),
        Spec("learned_policy", f"{where}:learned_drift", "LPO's network as drift, with random weights", tags, _LPO),
    ]  # fmt: skip
