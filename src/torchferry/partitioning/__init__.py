"""L2: cutting a graph into parts and joining parts again; pure graph work, without torch."""

from torchferry.partitioning.join import join
from torchferry.partitioning.plan import Partition, PartitionPlan, plan_partition
from torchferry.partitioning.policies import find_policy, register_policy
from torchferry.partitioning.split import partition, split, with_boundaries

__all__ = [
    "Partition",
    "PartitionPlan",
    "find_policy",
    "join",
    "partition",
    "plan_partition",
    "register_policy",
    "split",
    "with_boundaries",
]
