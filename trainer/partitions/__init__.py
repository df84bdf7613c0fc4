"""What one rank holds of the model being trained: the only home of DeepSpeed's and FSDP2's internals."""

from sidecast.trainer.partitions.layout import Layout, StalePartitionError
from sidecast.trainer.partitions.partition import Partition
from sidecast.trainer.partitions.rollback import RollbackCopy

__all__ = ["Layout", "Partition", "RollbackCopy", "StalePartitionError"]
