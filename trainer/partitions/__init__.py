"""What one rank holds of the model being trained: the only home of DeepSpeed's internals."""

from sidecast.trainer.partitions.contract import Partition
from sidecast.trainer.partitions.deepspeed import partition_of
from sidecast.trainer.partitions.remapping import RemappingPartition
from sidecast.trainer.partitions.rollback import RollbackCopy
from sidecast.trainer.partitions.staleness import StalePartitionError

__all__ = ["Partition", "RemappingPartition", "RollbackCopy", "StalePartitionError", "partition_of"]
