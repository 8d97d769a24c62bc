"""The archive of a search: an Optuna study whose trials are the candidates worth keeping.

So `optuna-dashboard` opens it, any Optuna storage holds it, and several processes on several machines share one. By default it
is a journal file beside the search's other files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDY_FILE = "study.log"


@dataclass(frozen=True)
class Elite:
    """A candidate that was among the best when it was found.

    Attributes:
        digest: names its text.
        text: the candidate itself.
        score: what the search minimises; finite.
        scores: what it is the mean of, such as one per task.
        worker, generation: who found it, when.
        parents: digests of what it was made of.
        facts: anything else worth keeping, as JSON holds it.
    """

    digest: str
    text: str
    score: float
    scores: Mapping[str, float]
    worker: int
    generation: int
    parents: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Archive:
    """The elites of one search.

    Args:
        directory: of the search; the journal file is there unless ``storage`` says otherwise.
        name: of the study.
        settings: of the search, as JSON holds them; a study of other settings is refused. None: those that it has.
        storage: URL of any Optuna storage (``sqlite:///...``, ``postgresql://...``).

    Raises:
        ValueError: Optuna is not installed, the storage cannot be opened, the study is of a search with other settings, or
            there is none whose settings could be taken.
    """

    def __init__(
        self, directory: Path, name: str, settings: Mapping[str, Any] | None, storage: str | None = None
    ) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            raise ValueError("a search needs the extra 'tune': pip install 'torch-metaopt[tune]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if settings is not None:
            directory.mkdir(parents=True, exist_ok=True)
        elif storage is None and not (directory / STUDY_FILE).is_file():
            raise ValueError(f"{directory} holds no search; make one with metaopt discover rule --out {directory}")
        try:
            opened = storage or JournalStorage(JournalFileBackend(str(directory / STUDY_FILE)))
            if settings is None:  # who only looks makes no study of another kind beside the one that is there
                self._study = optuna.load_study(study_name=name, storage=opened)
            else:
                self._study = optuna.create_study(
                    storage=opened, study_name=name, direction="minimize", load_if_exists=True
                )
        except KeyError:
            command = name.replace("-", " ")
            raise ValueError(
                f"{storage or directory} holds no search of metaopt {command}; give the directory of one"
            ) from None
        except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the storage cannot be opened: {reason}; give the URL of an Optuna storage, such as sqlite:///search.db"
            ) from None
        asked = json.loads(json.dumps(settings or {}))
        if settings is None:
            asked = self._study.user_attrs.get("settings", asked)
        kept = self._study.user_attrs.get("settings", asked)
        for key in {*asked, *kept}:
            if asked.get(key) != kept.get(key):
                found = f"{key}={kept.get(key)!r}, not {asked.get(key)!r}"
                if "\\n" in found:  # a program: too long for a message
                    found = f"another {key}"
                raise ValueError(
                    f"{storage or directory} holds a search with {found}; "
                    f"give the same settings to go on with it, or choose another directory"
                )
        if "settings" not in self._study.user_attrs:
            self._study.set_user_attr("settings", asked)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the search."""
        return dict(self._study.user_attrs["settings"])

    def add(self, elite: Elite) -> None:
        """Keep ``elite``, unless it is kept already: a search that goes on from a checkpoint finds some again.

        Raises:
            ValueError: a score that is not finite.
        """
        from optuna.trial import create_trial

        if not math.isfinite(elite.score):
            raise ValueError(f"the score of an elite must be finite, got {elite.score} for {elite.digest}")
        known = (elite.worker, elite.generation, elite.digest)
        if any((other.worker, other.generation, other.digest) == known for other in self.elites()):
            return
        attributes = {k: v for k, v in dataclasses.asdict(elite).items() if k != "score"}
        self._study.add_trial(create_trial(value=elite.score, user_attrs=attributes))

    def best_of_others(self, worker: int) -> list[Elite]:
        """The best elite of every worker but ``worker``, the best first."""
        bests: dict[int, Elite] = {}
        for elite in self.elites():
            bests.setdefault(elite.worker, elite)
        return [elite for elite in bests.values() if elite.worker != worker]

    def elites(self) -> list[Elite]:
        """All that are kept, by every worker, the best first; of equal scores the one found first."""
        found = [
            Elite(**{**trial.user_attrs, "score": trial.values[0], "parents": tuple(trial.user_attrs["parents"])})
            for trial in self._study.get_trials(deepcopy=False)
            if trial.values and "digest" in trial.user_attrs
        ]
        return sorted(found, key=lambda elite: elite.score)
