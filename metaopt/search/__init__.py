"""What every search shares: the archive, how candidates are asked for, and what paid calls may cost."""

from metaopt.search.archive import Archive, Elite
from metaopt.search.bandit import Bandit
from metaopt.search.ledger import Budget, Charge, Ledger
from metaopt.search.mixture import Mixture
from metaopt.search.proposal import BudgetSpent, Proposal, Proposer, ProposerError, Request, Validator

__all__ = [
    "Archive",
    "Bandit",
    "Budget",
    "BudgetSpent",
    "Charge",
    "Elite",
    "Ledger",
    "Mixture",
    "Proposal",
    "Proposer",
    "ProposerError",
    "Request",
    "Validator",
]
