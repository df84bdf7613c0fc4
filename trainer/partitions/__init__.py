"""What one rank holds of the model being trained: the only home of DeepSpeed's internals."""

from sidecast.trainer.partitions.contract import Partition
from sidecast.trainer.partitions.deepspeed import partition_of
from sidecast.trainer.partitions.layout import StalePartitionError
from sidecast.trainer.partitions.remapping import RemappingPartition
from sidecast.trainer.partitions.rollback import RollbackCopy

__all__ = ["Partition", "RemappingPartition", "RollbackCopy", "StalePartitionError", "partition_of"]
