"""Studies: where they are stored, what they are of, and that nobody goes on with another one by mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

STUDY_FILE = "study.log"
_SETTINGS = "metaopt"


def open_storage(url: str, *, existing: bool = False) -> BaseStorage:
    """The storage that ``url`` names.

    Args:
        url: ``journal:PATH`` (a file, for the processes of one machine), ``sqlite:///PATH``, ``postgresql://...`` or another
            URL of SQLAlchemy, or ``grpc://HOST:PORT`` of ``optuna.storages.run_grpc_proxy_server``.
        existing: a journal or SQLite file is to be there already, and not made.

    Raises:
        ValueError: text that is none of these, a driver that is not installed, what cannot be opened or made, or no file
            with ``existing``.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or not rest:
        raise ValueError(
            f"storage must be journal:PATH, sqlite:///PATH, postgresql://USER@HOST/NAME or grpc://HOST:PORT, got {url!r}"
        )
    path = rest if scheme == "journal" else _sqlite_file(url) if scheme.startswith("sqlite") else None
    if path is not None:
        if existing and not Path(path).exists():
            raise ValueError(f"storage {url!r} is no file; give the one that metaopt tune was given, or has made")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"storage {url!r} cannot be made: {error}") from None
    if scheme == "journal":
        return JournalStorage(JournalFileBackend(rest))
    if scheme == "grpc":
        return _grpc_proxy(url)
    from sqlalchemy.exc import OperationalError  # Optuna's own dependency; slow to import

    waits = {"connect_args": {"timeout": 60}} if scheme.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return RDBStorage(url, engine_kwargs=waits)
    except ImportError as error:
        raise ValueError(f"storage {url!r} needs a package that is not installed: {error}") from error
    except OperationalError as error:
        raise ValueError(f"storage {url!r} cannot be opened: {str(error.orig).splitlines()[0]}") from error


def _sqlite_file(url: str) -> str | None:
    from sqlalchemy import make_url

    return make_url(url).database


def _grpc_proxy(url: str) -> BaseStorage:
    import warnings
    from urllib.parse import urlsplit

    address = urlsplit(url)
    if not address.hostname or not address.port:
        raise ValueError(f"a gRPC storage is grpc://HOST:PORT, got {url!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.GrpcStorageProxy(host=address.hostname, port=address.port)
    except ImportError as error:
        raise ValueError(f"a gRPC storage needs the package grpcio: {error}") from error


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any], directions: int) -> optuna.Study:
    """The study of that name, made if there is none.

    Args:
        storage: of `open_storage`.
        name: of the study.
        settings: of the search, as JSON holds them. They are kept with the study; ``trials`` may grow or shrink later.
        directions: number of objectives, all minimised.

    Raises:
        ValueError: there is one, with other settings.
    """
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * directions, load_if_exists=True
    )
    asked = json.loads(json.dumps(dict(settings)))
    kept = study.user_attrs.get(_SETTINGS, asked)
    for key in {**asked, **kept}:
        if asked.get(key) != kept.get(key) and key != "trials":
            raise ValueError(
                f"study {name!r} is of a search with {key}={kept.get(key)!r}, not {asked.get(key)!r}; give the same settings "
                f"to go on with it, or choose another study or directory"
            )
    if asked != study.user_attrs.get(_SETTINGS):
        study.set_user_attr(_SETTINGS, asked)
    return study


def settings_of(storage: BaseStorage, name: str) -> dict[str, Any]:
    """The settings that `open_study` kept.

    Raises:
        ValueError: no such study, or one that metaopt did not make.
    """
    try:
        study = optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise ValueError(f"the storage holds no study {name!r}; it holds {known}; metaopt tune makes one") from None
    if _SETTINGS not in study.user_attrs:
        raise ValueError(f"study {name!r} was not made by metaopt tune, which keeps its settings with the study")
    return dict(study.user_attrs[_SETTINGS])
