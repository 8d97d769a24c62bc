"""Races: contenders under one protocol, honest statistics, and reports."""

from metaopt.evaluate.losses import split_losses
from metaopt.evaluate.race import Entry, RaceResult, race
from metaopt.evaluate.report import save, table
from metaopt.evaluate.statistics import Estimate, estimate, iqm

__all__ = ["Entry", "Estimate", "RaceResult", "estimate", "iqm", "race", "save", "split_losses", "table"]
