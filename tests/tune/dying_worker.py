"""A worker that claims trials of a study and then stands still, its heart beating, until it is killed.

python dying_worker.py STORAGE STUDY BATCH
"""

from __future__ import annotations

import sys
import time

from metaopt.tune.studies import open_storage, settings_of
from metaopt.tune.tuning import Problem, config_of, require_optuna, work


def stand_still(runs: object) -> None:
    print("standing still", flush=True)
    time.sleep(300)


if __name__ == "__main__":
    require_optuna()
    import optuna

    storage = open_storage(sys.argv[1])
    settings = settings_of(storage, sys.argv[2])
    study = optuna.load_study(storage=storage, study_name=sys.argv[2])
    work(Problem(config_of(settings, settings["trials"])), study, batch=int(sys.argv[3]), on_unit=stand_still)
