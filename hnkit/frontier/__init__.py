"""Reward per nat: what a map's nats could have bought, and how far it is from its target."""

from hnkit.frontier.certified import GapBound, gap_lower_bound, nats_lower_bound
from hnkit.frontier.curve import BestOf, Frontier, FrontierPoint
from hnkit.frontier.table import MethodGain, Rewards, frontier_document, methods_on_frontier, no_frontier, read_rewards

__all__ = [
    "BestOf",
    "Frontier",
    "FrontierPoint",
    "GapBound",
    "MethodGain",
    "Rewards",
    "frontier_document",
    "gap_lower_bound",
    "methods_on_frontier",
    "nats_lower_bound",
    "no_frontier",
    "read_rewards",
]
