"""What every search shares: the archive, and how candidates are asked for."""

from metaopt.search.archive import Archive, Elite
from metaopt.search.proposal import Proposal, Proposer, ProposerError, Request, Validator

__all__ = ["Archive", "Elite", "Proposal", "Proposer", "ProposerError", "Request", "Validator"]
