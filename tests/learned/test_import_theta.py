"""Checkpoints of the JAX originals become directories of meta-parameters, without JAX and without trust in the file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from golden_vectors import load

import metaopt
from metaopt import registry
from metaopt.cli import main
from metaopt.learned import BoundRule
from metaopt.resolve import load_theta
from metaopt_learned.import_theta import SIZES, import_flax, read_flax

SHARED = Path(__file__).parents[2].parent / "shared" / "golden"
FILES = {
    "small_fc_lopt": ("adafac_mlp_lopt_h32", {"hidden": 32}),
    "mlp_lopt": ("mlp_lopt", {"hidden": 32}),
    "mlp_nominal": ("mlp_nom_lopt_default", {"hidden": 4}),
    "celo2_base": ("celo2base", {"hidden": 8}),
    "celo2": ("celo2", {"hidden": 8}),
    "velo": ("hyperv2_released", {"hidden": 4, "lstm_hidden": 64, "bank": 32}),
    "celo": ("celo_phase2", {"hidden": 4, "lstm_hidden": 64}),
    "celo_adam": ("celo_adam", {"lstm_hidden": 64}),
    "rnn_mlp_lopt": ("rnn_mlp_lopt", {"hidden": 32, "lstm_hidden": 64}),
    "nn_adam": ("nn_adam", {"lstm_hidden": 32}),
}


def packed(value: Any, code: int = 1) -> msgpack.ExtType:
    """An array, or a scalar (code 3), as flax writes it."""
    array = np.asarray(value)
    return msgpack.ExtType(code, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def flax_bytes(arrays: Mapping[str, Any], **beside: Any) -> bytes:
    """Nested maps from names such as ``rnn_params/rnn/linear/w``; like haiku's, module names keep their slashes."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition("/")
        top, _, rest = module.partition("/")
        place = tree
        for part in (top, rest):
            place = place.setdefault(part, {}) if part else place
        place[leaf] = array if isinstance(array, msgpack.ExtType) else packed(array)
    return msgpack.packb({"params": tree, **beside} if beside else tree, use_bin_type=True)


def theta_arrays(file: str) -> dict[str, np.ndarray]:
    arrays, _ = load(file)
    return {name.removeprefix("theta/"): value for name, value in arrays.items() if name.startswith("theta/")}


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_becomes_a_rule_of_its_sizes(name: str, tmp_path: Path) -> None:
    file, sizes = FILES[name]
    arrays = theta_arrays(file)
    (tmp_path / "theta.state").write_bytes(flax_bytes(arrays))
    assert main(["import-theta", str(tmp_path / "theta.state"), "--as", name, "--out", str(tmp_path / "run")]) == 0
    bound = load_theta(tmp_path / "run")
    assert {key: getattr(bound.learned, key) for key in sizes} == sizes
    want = registry.create("learned_optimizer", name).theta_from_original(
        {key: torch.from_numpy(value) for key, value in arrays.items()}
    )
    assert bound.theta.keys() == want.keys() and all(torch.equal(bound.theta[key], want[key]) for key in want)


def test_every_importer_is_tested_and_is_a_learned_optimizer() -> None:
    assert {*registry.specs("importer")} == {*SIZES} <= {*registry.specs("learned_optimizer")}
    assert {*SIZES} - {*FILES} == {"mulo"}, "which has the meta-parameters of small_fc_lopt"


def test_mulo_reads_the_same_arrays_as_small_fc_lopt(tmp_path: Path) -> None:
    path = tmp_path / "theta.state"
    path.write_bytes(flax_bytes(theta_arrays("adafac_mlp_lopt_h32")))
    mulo, plain = (registry.create("importer", name, path=path) for name in ("mulo", "small_fc_lopt"))
    assert all(torch.equal(mulo.theta[key], value) for key, value in plain.theta.items())


def test_imported_rule_trains(tmp_path: Path) -> None:
    (tmp_path / "params_100").write_bytes(flax_bytes(theta_arrays("celo_phase2"), step=packed(100, 3), gen_id="a"))
    command = ["import-theta", str(tmp_path / "params_100"), "--as", "celo", "--out", str(tmp_path / "run")]
    assert main([*command, "--set", "phase=1"]) == 0
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = metaopt.optimizer(str(tmp_path / "run"), model, horizon=10)
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert isinstance(optimizer.rule, BoundRule) and optimizer.rule.learned.phase == 1
    assert not torch.equal(model.weight, before)


def test_bfloat16_half_and_double_arrays_and_scalars_are_read_in_place_of_float32(tmp_path: Path) -> None:
    third = torch.tensor([1 / 3, -2.0])
    bits = third.to(torch.bfloat16).view(torch.int16).numpy()
    bfloat16 = msgpack.ExtType(1, msgpack.packb(((2,), "bfloat16", bits.tobytes()), use_bin_type=True))
    file = tmp_path / "file"
    arrays = {"half": third.half().numpy(), "double": third.double().numpy(), "brain": bfloat16}
    arrays |= {"scalar": packed(np.float32(0.5), 3), "empty": np.zeros((0, 2), np.float32), "count": np.arange(3)}
    file.write_bytes(flax_bytes(arrays))
    found = read_flax(file)
    assert found.keys() == {"half", "double", "brain", "scalar", "empty"}, "whole numbers are no meta-parameters"
    assert torch.equal(found["brain"].float(), third.to(torch.bfloat16).float()) and float(found["scalar"]) == 0.5
    assert torch.equal(found["half"], third.half()) and torch.equal(found["double"], third.double())
    assert found["empty"].shape == (0, 2)


def broken(**changes: Any) -> bytes:
    arrays: dict[str, Any] = {**theta_arrays("celo_phase2")}
    for name, change in changes.items():
        key = name.replace("__", "/")
        arrays[key] = change(arrays.get(key))
    return flax_bytes({key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95 a pickle", "msgpack format"),
        (b"", "msgpack format"),
        (msgpack.packb([1, 2]), "holds no arrays"),
        (msgpack.packb({"a": {"b": 1}}), "holds no arrays"),
        (b"\x81\xa1a" * 900 + b"\xc0", "holds no arrays|msgpack format"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([3, 4]))}), "shape, a dtype and bytes"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1 << 40], "float32", b"1234")))}), "4 bytes"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([-1], "float32", b"")))}), "0 bytes"),
        (broken(rnn_params__step_size__w=lambda _: None), "step_size/w.* is missing"),
        (broken(rnn_params__step_size__w=lambda w: w[:5]), r"lstm.step_w is \(5, 1\), expected \(64, 1\)"),
        (broken(lstm_init_state__cell=lambda c: c * np.nan), "not finite, in lstm.cell"),
        (flax_bytes(theta_arrays("mlp_lopt")), "no checkpoint of celo"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        registry.create("importer", "celo", path=tmp_path / "file")


def test_missing_file_and_missing_package_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*; give a checkpoint"):
        registry.create("importer", "velo", path=tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    code = (
        "import sys; sys.modules['msgpack'] = None; from metaopt import registry\n"
        f"try: registry.create('importer', 'velo', path={str(tmp_path / 'file')!r})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'torch-metaopt[import]'" in done.stdout


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_published_weights_are_imported_as_they_are(name: str, tmp_path: Path) -> None:
    file = SHARED / f"{name}_trained_theta.npz"
    if not file.is_file():
        pytest.skip(f"the trained weights {file.name} are not in {SHARED}")
    with np.load(file) as archive:
        arrays = {key: archive[key] for key in archive.files}
    (tmp_path / "theta.state").write_bytes(flax_bytes(arrays))
    theta = registry.create("importer", name, path=tmp_path / "theta.state").theta
    unused = {key for key in arrays if key.startswith(("rnn_params/linear/", "rnn_params/rnn_to_controls/"))}
    assert sum(v.numel() for v in theta.values()) == sum(v.size for key, v in arrays.items() if key not in unused)
    total = sum(float(np.abs(value).sum(dtype=np.float64)) for key, value in arrays.items() if key not in unused)
    assert sum(float(v.double().abs().sum()) for v in theta.values()) == pytest.approx(total, rel=1e-12)


def test_an_optimizer_that_has_no_original_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^name must be one of small_fc_lopt, .*, got 'orthogonal_mlp'$"):
        import_flax(tmp_path / "theta.state", "orthogonal_mlp")
