"""What one rank holds of the model being trained: the only home of DeepSpeed's internals."""

from sidecast.trainer.nowcast.partitions.contract import Partition
from sidecast.trainer.nowcast.partitions.remapping import RemappingPartition
from sidecast.trainer.nowcast.partitions.rollback import RollbackCopy
from sidecast.trainer.nowcast.partitions.selection import partition_of
from sidecast.trainer.nowcast.partitions.staleness import StalePartitionError

__all__ = ["Partition", "RemappingPartition", "RollbackCopy", "StalePartitionError", "partition_of"]
