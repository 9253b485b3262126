"""L2: cutting a graph into parts and joining parts again; pure graph work, without torch."""

from torchferry.partitioning.join import join
from torchferry.partitioning.plan import Partition, PartitionPlan, plan_partition
from torchferry.partitioning.split import partition, split

__all__ = ["Partition", "PartitionPlan", "join", "partition", "plan_partition", "split"]
