"""The hand-designed rules agree with the peers' own code, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import assert_trajectory_close, load, under

from metaopt.rule import Context, UpdateRule, infer_info
from metaopt_classic.adafactor import Adafactor
from metaopt_classic.adam import LAMB, AdaBelief, Adam, AdamW, AMSGrad
from metaopt_classic.lion import Lion
from metaopt_classic.muon import Muon
from metaopt_classic.rmsprop import RMSprop
from metaopt_classic.sgd import SGD

MATRICES = ("t0_w0", "t2_w1", "t6_square")
TIGHT = {"of_move": 1e-10, "of_size": 1e-14}  # float64 against float64: rounding only
BF16_NS = {"of_move": 1e-2, "of_size": 0.0}  # torch's Muon orthogonalises in bfloat16


def _amsgrad(given: dict[str, Any]) -> AMSGrad:
    keys = ("lr", "betas", "eps", "weight_decay")
    return AMSGrad(decoupled=given["decoupled_weight_decay"], **{k: given[k] for k in keys})


def _adafactor(given: dict[str, Any]) -> Adafactor:
    return Adafactor(**{**given, "eps": (given["eps"][0] or 0.0, given["eps"][1])})


def _torch_muon(given: dict[str, Any]) -> Muon:
    keys = ("lr", "momentum", "nesterov", "ns_steps", "weight_decay", "eps")
    return Muon(scaling=given.get("adjust_lr_fn", "original"), **{k: given[k] for k in keys})


def _optax_muon(given: dict[str, Any]) -> Muon:
    return Muon(
        lr=given["learning_rate"], momentum=given["beta"], nesterov=given["nesterov"], ns_steps=given["ns_steps"],
        weight_decay=given["weight_decay"], eps=given["eps"], scaling="original", bias_correction=True,
    )  # fmt: skip


def _lamb(given: dict[str, Any]) -> LAMB:
    betas = given["b1"], given["b2"]
    return LAMB(lr=given["learning_rate"], betas=betas, eps=given["eps"], weight_decay=given["weight_decay"])


def _plain(cls: type[UpdateRule], *keys: str) -> Any:
    return lambda given: cls(**{key: given[key] for key in keys})


ADAM_KEYS = ("lr", "betas", "eps", "weight_decay")
CASES = [
    ("classic_sgd", "default", _plain(SGD, "lr", "momentum", "dampening", "weight_decay", "nesterov"), TIGHT),
    ("classic_sgd", "momentum", _plain(SGD, "lr", "momentum", "dampening", "weight_decay", "nesterov"), TIGHT),
    ("classic_sgd", "nesterov", _plain(SGD, "lr", "momentum", "dampening", "weight_decay", "nesterov"), TIGHT),
    ("classic_adam", "default", _plain(Adam, *ADAM_KEYS), TIGHT),
    ("classic_adam", "l2", _plain(Adam, *ADAM_KEYS), TIGHT),
    ("classic_adamw", "default", _plain(AdamW, *ADAM_KEYS), TIGHT),
    ("classic_adamw", "nondefault", _plain(AdamW, *ADAM_KEYS), TIGHT),
    ("classic_amsgrad", "adam_amsgrad", _amsgrad, TIGHT),
    ("classic_amsgrad", "adamw_amsgrad", _amsgrad, TIGHT),
    ("classic_adabelief", "default", _plain(AdaBelief, *ADAM_KEYS), TIGHT),
    ("classic_adabelief", "nondefault", _plain(AdaBelief, *ADAM_KEYS), TIGHT),
    ("classic_lamb", "default", _lamb, TIGHT),
    ("classic_lamb", "nondefault", _lamb, TIGHT),
    ("classic_rmsprop", "default", _plain(RMSprop, "lr", "alpha", "eps", "weight_decay"), TIGHT),
    ("classic_lion", "default", _plain(Lion, "lr", "betas", "weight_decay"), TIGHT),
    ("classic_lion", "nondefault", _plain(Lion, "lr", "betas", "weight_decay"), TIGHT),
    ("classic_adafactor", "default", _adafactor, TIGHT),
    ("classic_adafactor", "nondefault", _adafactor, TIGHT),
    ("classic_muon", "default", _torch_muon, BF16_NS),
    ("classic_muon", "nondefault", _torch_muon, BF16_NS),
    ("classic_muon_exact", "default", _optax_muon, TIGHT),
    ("classic_muon_exact", "nondefault", _optax_muon, TIGHT),
]


@pytest.mark.parametrize(("file", "setting", "make", "tolerance"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_rule_follows_the_reference_trajectory(file: str, setting: str, make: Any, tolerance: dict[str, float]) -> None:
    arrays, meta = load(file)
    inputs, _ = load("classic_inputs")
    wanted = under(arrays, f"{setting}/params")
    transposed = file == "classic_muon_exact"  # optax's matrices are [in, out]

    def layout(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mT if transposed else tensor

    params = {name: layout(value) for name, value in under(inputs, "params0").items() if name in wanted}
    grads = {name: layout(value) for name, value in under(inputs, "grads").items() if name in wanted}
    rule = make(meta["settings"][setting]["hyperparameters"])
    assert set(params) == set(wanted)
    info = infer_info(params, dict.fromkeys(MATRICES, "hidden") if "muon" in file else None)
    state, start = rule.init(params, info), params
    saved: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for t in range(max(meta["steps_saved"])):
        at_t = {name: value[t] for name, value in grads.items()}
        params, state = rule.update(at_t, state, params, rule.hp, Context(info))
        if t + 1 in meta["steps_saved"]:
            for name, value in params.items():
                saved[name].append(value)
    for name, values in saved.items():
        assert_trajectory_close(torch.stack(values), layout(wanted[name]), start[name], **tolerance)
